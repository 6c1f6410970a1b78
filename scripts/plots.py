"""Each plot of a page of benches as a PNG file, called after its title.

    PYTHONPATH=tests/e2e python3 scripts/plots.py PAGE.html FOLDER
"""

import base64
import collections
import os
import pathlib
import re
import sys

from browser import Browser

FIGURES = """[...document.querySelectorAll("figure")].map(figure => {
    const {x, y, width, height} = figure.getBoundingClientRect();
    return {title: figure.querySelector("h3").innerText, clip: {x: x + scrollX, y: y + scrollY, width, height, scale: 2}};
})"""

page, folder = sys.argv[1:]
with Browser() as browser:
    tab = browser.tab(pathlib.Path(page).as_uri(), width=1280)
    tab.prefer("light")
    figures = tab.evaluate(FIGURES)
    assert figures, f"{page} has no plot"
    names = collections.Counter()
    for figure in figures:
        name = re.sub(r"\W+", "-", figure["title"].lower()).strip("-")
        names[name] += 1
        path = os.path.join(folder, f"{name}.png" if names[name] == 1 else f"{name}-{names[name]}.png")
        picture = tab.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=figure["clip"])
        with open(path, "wb") as file:
            file.write(base64.b64decode(picture["data"]))
        print(path)
