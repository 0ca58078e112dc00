//! The question about a file.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// A request to analyse a file (`MessageType::ANALYZE_FILE`): its path or its content, one of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "rkyv", derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AnalyzeFile {
    /// A file that the server reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The text itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A question about it, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
}

/// [`AnalyzeFile`], borrowed from a body where it can be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AnalyzeFileRef<'a> {
    /// A file that the server reads.
    pub path: Option<Cow<'a, str>>,
    /// The text itself.
    pub content: Option<Cow<'a, str>>,
    /// A question about it, in words.
    pub question: Option<Cow<'a, str>>,
}

impl AnalyzeFileRef<'_> {
    /// The same, with memory of its own.
    pub fn into_owned(self) -> AnalyzeFile {
        AnalyzeFile {
            path: self.path.map(Cow::into_owned),
            content: self.content.map(Cow::into_owned),
            question: self.question.map(Cow::into_owned),
        }
    }
}

impl From<AnalyzeFile> for AnalyzeFileRef<'static> {
    fn from(request: AnalyzeFile) -> Self {
        Self {
            path: request.path.map(Cow::Owned),
            content: request.content.map(Cow::Owned),
            question: request.question.map(Cow::Owned),
        }
    }
}
