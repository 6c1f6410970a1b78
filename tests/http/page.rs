//! The page's files.

use super::*;

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let server = Setup::default().start();
    let page = server.get("/");
    assert!(page.text().contains("<title>Fullbore</title>"));
    assert!(page.head.contains("content-security-policy: default-src 'none'; script-src 'self'"), "{}", page.head);
    let text = page.text();
    let named = |file: &str| text.contains(&format!("\"page/{file}\""));
    assert!(["page.js", "page.css", "chat.css", "live.css"].into_iter().all(named));
    for path in page_files() {
        let asset = server.get(&path);
        assert_eq!(asset.status, 200, "{path}");
        assert!(!asset.text().contains("//cdn") && !asset.text().contains("https://"), "{path}");
        assert!(asset.head.contains("x-content-type-options: nosniff"), "{}", asset.head);
    }
    server.get("/page/").error(404);
    server.get("/page/..%2fpage.rs").error(404);
}

/// `/` and every file of the page's folder, as the server names them.
fn page_files() -> Vec<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("server/src/page");
    let names = std::fs::read_dir(folder).expect("a folder of the tree").flatten();
    let names = names.map(|entry| entry.file_name().into_string().expect("UTF-8"));
    let path = |name: String| if name == "page.html" { "/".to_owned() } else { format!("/page/{name}") };
    names.map(path).collect()
}
