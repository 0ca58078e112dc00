//! Reading what the kernel says in files. A file that is not there is an answer, too.

use std::path::PathBuf;

/// The files below a root: `/`, or a made-up tree.
#[derive(Debug, Clone)]
pub struct Files(pub PathBuf);

impl Files {
    /// The text of a file, white space around it left out; `None` if there is none to be read.
    pub fn text(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.0.join(path.trim_start_matches('/'))).ok()?;
        Some(text.trim().to_owned())
    }

    /// The number in a file.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The list of cores in a file, such as `0-3,8`; empty if there is none to be read.
    pub fn cores(&self, path: &str) -> Vec<usize> {
        self.text(path).map(|text| parse_cores(&text)).unwrap_or_default()
    }
}

/// Reads the kernel's list format. What it cannot read it leaves out.
fn parse_cores(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<usize>().ok()?..=to.parse::<usize>().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A made-up tree of files, removed with it.
    pub struct Tree {
        /// The files.
        pub files: Files,
    }

    impl Tree {
        /// Makes the tree with these files in it.
        pub fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("doorbell-files-{}-{name}", std::process::id()));
            std::fs::create_dir(&root).unwrap();
            for (path, text) in files {
                let path = root.join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self { files: Files(root) }
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.files.0).ok();
        }
    }

    #[test]
    fn lists_of_cores_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cores("0-2,8,10-11"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(parse_cores(""), [] as [usize; 0]);
        assert_eq!(parse_cores("x,3,4-y"), [3]);
    }

    #[test]
    fn what_is_not_there_or_no_number_is_no_answer() {
        let tree = Tree::new("answers", &[("a/number", "42\n"), ("a/word", "max\n"), ("a/list", "0-1\n")]);
        let files = &tree.files;
        assert_eq!(
            (files.number("a/number"), files.number("/a/word"), files.number("b")),
            (Some(42), None, None)
        );
        assert_eq!((files.cores("a/list"), files.cores("b")), (vec![0, 1], vec![]));
        assert_eq!(files.text("/a/word").as_deref(), Some("max"));
    }
}
