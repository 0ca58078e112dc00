//! Kill points: the labels in the sources and the list of them, and that nothing is left of them in what is shipped.

use doorbell_shm::kill::{POINTS, is_listed};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("shm/src/kill.rs") {
            found.push(path);
        }
    }
}

/// The labels of every `kill_point!` in the sources, with where each stands.
fn used() -> BTreeMap<String, Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in ["src", "shm/src", "uring/src"] {
        sources(&root().join(folder), &mut files);
    }
    let mut used: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        for call in text.split("kill_point!(").skip(1) {
            let arguments = call.split(')').next().unwrap();
            for label in arguments.split('"').skip(1).step_by(2) {
                used.entry(label.to_owned()).or_default().push(path.clone());
            }
        }
    }
    used
}

/// Goal:   T9: every labelled point is in the list that the stress command goes through, and the other way round; each
///         stands in one place, of the side that its label names; there are as many as the suite wants.
/// Method: the sources are read. A label that is not in the list does not compile with the feature, either.
#[test]
fn t9_every_label_is_listed_and_stands_in_one_place() {
    let used = used();
    for (label, places) in &used {
        assert!(is_listed(label), "{label} of {places:?} is not in kill::POINTS");
        assert_eq!(places.len(), 1, "{label} stands in {places:?}");
        let beside = if label.starts_with("client.") { "src/server" } else { "src/client" };
        assert!(!places[0].starts_with(root().join(beside)), "{label} stands in {places:?}");
    }
    for (label, what) in POINTS {
        assert!(used.contains_key(*label) && !what.is_empty(), "{label} is nowhere in the sources");
    }
    let of = |side: &str| POINTS.iter().filter(|(label, _)| label.starts_with(side)).count();
    let (clients, servers) = (of("client."), of("server."));
    assert_eq!((clients + servers, used.len()), (POINTS.len(), POINTS.len()));
    assert!(clients >= 15 && servers >= 12, "{clients} and {servers} points");
    assert!(!is_listed("client") && !is_listed("client.entry.halfway") && !is_listed(""));
}

/// Goal:   T9: whoever reads about reliability finds every point with what is half done there.
#[test]
fn t9_the_table_of_points_is_complete() {
    let text = std::fs::read_to_string(root().join("docs/reliability.md")).unwrap();
    for (label, what) in POINTS {
        assert!(
            text.contains(&format!("| `{label}` | {what} |")),
            "docs/reliability.md lacks {label}: {what}"
        );
    }
}

/// Goal:   T9: nothing is left of the points in what is shipped.
/// Method: the command as these tests are built with it has neither a label nor the variable that arms one.
#[cfg(not(feature = "kill-points"))]
#[test]
fn t9_nothing_is_left_of_them_without_the_feature() {
    use doorbell_shm::kill::VARIABLE;
    let binary = std::fs::read(env!("CARGO_BIN_EXE_doorbell")).unwrap();
    let text = String::from_utf8_lossy(&binary);
    assert!(text.contains("all slots, ring entries or places"), "texts are found");
    // One of each crate and side, and the first and the last of the list.
    let labels = [
        "server.completion.half",
        "server.memory.sealed",
        "client.request.written",
        "server.position.published",
    ];
    for absent in labels.iter().chain([&POINTS[0].0, &POINTS[POINTS.len() - 1].0, &VARIABLE]) {
        assert!(*absent == VARIABLE || is_listed(absent));
        assert!(!text.contains(absent), "{absent} is in the binary");
    }
}
