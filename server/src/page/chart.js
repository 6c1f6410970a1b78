// Charts of time as SVG: bands that add up, and lines. A chart is drawn anew from numbers; colours and strokes are the
// style sheet's, by class. X runs from 0, the beginning of the span, to 1, now.

const WIDTH = 1000;
const HEIGHT = 100;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  // `bands` and `lines` are class names, bands from the bottom up.
  constructor(label, { bands = [], lines = [] }) {
    this.element = document.createElementNS(SVG, "svg");
    this.element.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.element.setAttribute("preserveAspectRatio", "none");
    this.element.setAttribute("role", "img");
    this.element.setAttribute("aria-label", label);
    this.bands = bands.map((name) => this.#path(`band ${name}`));
    this.lines = lines.map((name) => this.#path(`line ${name}`));
    this.cursor = this.#path("cursor");
  }

  // `xs` has one number a point; `bands` and `lines` have as many rows of numbers, `null` where there is none. The top
  // of the chart is `most`.
  draw(xs, { bands = [], lines = [], most }) {
    let floor = xs.map(() => 0);
    bands.forEach((values, index) => {
      const roof = floor.map((below, at) => below + (values[at] ?? 0));
      this.bands[index].setAttribute("d", area(xs, floor, roof, most));
      floor = roof;
    });
    lines.forEach((values, index) => this.lines[index].setAttribute("d", line(xs, values, most)));
  }

  // Marks a moment, or none.
  point(x) {
    this.cursor.setAttribute("d", x === null ? "" : `M${round(x * WIDTH)},0V${HEIGHT}`);
  }

  #path(className) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", className);
    this.element.append(path);
    return path;
  }
}

const round = (number) => Math.round(number * 10) / 10;
const at = (x, value, most) => `${round(x * WIDTH)},${round(HEIGHT * (1 - Math.min(value / most, 1)))}`;

function area(xs, floor, roof, most) {
  if (xs.length === 0) return "";
  const there = xs.map((x, index) => at(x, roof[index], most));
  const back = xs.map((x, index) => at(x, floor[index], most)).reverse();
  return `M${there.join("L")}L${back.join("L")}Z`;
}

// A number without neighbours is a dot, which a path draws as a stroke of no length.
function line(xs, values, most) {
  let path = "";
  values.forEach((value, index) => {
    if (value === null) return;
    const isStart = index === 0 || values[index - 1] === null;
    path += `${isStart ? "M" : "L"}${at(xs[index], value, most)}${isStart ? "h0" : ""}`;
  });
  return path;
}

// The next round number above, for the top of a chart.
export function roundUp(number) {
  if (!(number > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= number);
}
