//! Counts of a run that can be cut off and gone on with: a file of JSON.

use crate::error::StressError;
use serde::{Serialize, de::DeserializeOwned};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// What an earlier run left in the file, if there is one.
///
/// # Errors
///
/// [`StressError`] if the file cannot be read, or holds something else.
pub fn load<T: DeserializeOwned>(file: Option<&Path>) -> Result<Option<T>, StressError> {
    let Some(file) = file else { return Ok(None) };
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(serde_json::from_str(&text)?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StressError::os("reading the counts", error)),
    }
}

/// Leaves counts in the file. They are written beside it and renamed: a run that is cut off leaves whole ones.
///
/// # Errors
///
/// [`StressError::Os`] if they cannot be written.
pub fn keep<T: Serialize>(file: Option<&Path>, counts: &T) -> Result<(), StressError> {
    let Some(file) = file else { return Ok(()) };
    let text = serde_json::to_string(counts).expect("numbers and texts are JSON");
    let beside = file.with_extension("new");
    fs::write(&beside, text)
        .and_then(|()| fs::rename(&beside, file))
        .map_err(|source| StressError::os("writing the counts", source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Directory;

    /// Goal:   what was kept is loaded; without a file there is nothing; a file of something else is an error and stays.
    #[test]
    fn what_was_kept_is_loaded() {
        let directory = Directory::new("kept").unwrap();
        let file = directory.path().join("counts.json");
        assert_eq!((load::<Vec<u64>>(None).unwrap(), load::<Vec<u64>>(Some(&file)).unwrap()), (None, None));
        keep(None, &vec![1]).unwrap();
        for counts in [vec![1, 2], vec![3]] {
            keep(Some(&file), &counts).unwrap();
            assert_eq!(load(Some(&file)).unwrap(), Some(counts));
        }
        assert!(!file.with_extension("new").exists());
        fs::write(&file, "none").unwrap();
        load::<Vec<u64>>(Some(&file)).unwrap_err();
        load::<Vec<u64>>(Some(directory.path())).unwrap_err();
        keep(Some(&directory.path().join("no/counts")), &1).unwrap_err();
    }
}
