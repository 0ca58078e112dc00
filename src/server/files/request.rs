//! The body of `AnalyzeFile`: `{ "path": "...", "question"?: "..." }` or `{ "content": "...", "question"?: "..." }`.

use crate::codec::{Codec, DecodeError, Json};
use crate::messages::AnalyzeFileRef;
use crate::server::HandlerError;
use std::borrow::Cow;
use std::path::Path;

/// Longest path, bytes: what the kernel takes.
pub const PATH_MAX: usize = 4095;

/// What a client wants to know, and of what. Texts are borrowed from the body unless they have escapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnalyzeRequest<'a> {
    /// What is to be analysed.
    pub subject: Subject<'a>,
    /// A question about it, in words.
    pub question: Option<Cow<'a, str>>,
}

/// What is to be analysed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject<'a> {
    /// A file that the server reads: absolute, or relative to one of its roots.
    Path(Cow<'a, str>),
    /// The text itself.
    Content(Cow<'a, str>),
}

/// What is wrong with a request. Names the field, and what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The body is not such a message.
    #[error(transparent)]
    Body(#[from] DecodeError),
    /// Neither path nor content.
    #[error("the request has neither `path` nor `content`: give one of them")]
    NoSubject,
    /// Path and content.
    #[error("the request has both `path` and `content`: give one of them")]
    TwoSubjects,
    /// A path that can name no file.
    #[error("`path` {0}")]
    Path(&'static str),
}

/// What the client is told.
impl From<RequestError> for HandlerError {
    fn from(error: RequestError) -> Self {
        HandlerError::Decode(error.to_string())
    }
}

impl<'a> AnalyzeRequest<'a> {
    /// Reads a request in JSON. A field that is `null` is as good as absent; one that is not known is an error, so that a
    /// misspelt one is noticed.
    ///
    /// Cost:   two passes over the body; a copy of a text only if it has escapes.
    ///
    /// # Errors
    ///
    /// [`RequestError`], naming the field.
    pub fn parse(body: &'a [u8]) -> Result<Self, RequestError> {
        Self::decode(&Json::new(), body)
    }

    /// Reads a request of any codec.
    ///
    /// # Errors
    ///
    /// [`RequestError`], naming the field.
    pub fn decode(codec: &dyn Codec, body: &'a [u8]) -> Result<Self, RequestError> {
        let AnalyzeFileRef { path, content, question } = codec.decode_analyze(body)?;
        let subject = match (path, content) {
            (Some(path), None) => Subject::Path(checked(path)?),
            (None, Some(content)) => Subject::Content(content),
            (None, None) => return Err(RequestError::NoSubject),
            (Some(_), Some(_)) => return Err(RequestError::TwoSubjects),
        };
        Ok(Self { subject, question })
    }
}

impl Subject<'_> {
    /// The path, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(Path::new(&**path)),
            Self::Content(_) => None,
        }
    }
}

fn checked(path: Cow<'_, str>) -> Result<Cow<'_, str>, RequestError> {
    match &*path {
        "" => Err(RequestError::Path("is empty: name a file, or give `content`")),
        path if path.len() > PATH_MAX => Err(RequestError::Path("has more than 4095 bytes: give `content`")),
        path if path.contains('\0') => Err(RequestError::Path("contains U+0000, which no file name does")),
        _ => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(body: &str) -> String {
        error_of(body.as_bytes())
    }

    fn error_of(body: &[u8]) -> String {
        AnalyzeRequest::parse(body).unwrap_err().to_string()
    }

    /// Goal:   R2.11: a path or a content, with or without a question, in any order, borrowed where it can be.
    #[test]
    fn r2_11_requests_are_read() {
        let body = r#"{"path":"src/lib.rs","question":"what does it do?"}"#;
        let request = AnalyzeRequest::parse(body.as_bytes()).unwrap();
        assert_eq!(request.subject.path(), Some(Path::new("src/lib.rs")));
        assert!(matches!(request.subject, Subject::Path(Cow::Borrowed(_))));
        assert_eq!(request.question.as_deref(), Some("what does it do?"));

        let body = r#" { "question": null, "path": null, "content" : "a\nb \u00e9 \ud83d\ude00" } "#;
        let request = AnalyzeRequest::parse(body.as_bytes()).unwrap();
        assert_eq!(request.subject, Subject::Content("a\nb é 😀".into()));
        assert_eq!((request.question, request.subject.path()), (None, None));

        assert_eq!(
            AnalyzeRequest::parse(br#"{"content":""}"#).unwrap().subject,
            Subject::Content("".into()),
            "an empty text can be analysed"
        );
    }

    /// Goal:   R2.11, S9: what is wrong is said with the name of the field.
    #[test]
    fn r2_11_what_is_wrong_with_a_request_is_named() {
        assert_eq!(
            error(r#"{"question":"?"}"#),
            "the request has neither `path` nor `content`: give one of them"
        );
        assert_eq!(
            error(r#"{"path":"a","content":"b"}"#),
            "the request has both `path` and `content`: give one of them"
        );
        for (body, parts) in [
            (r#"{"path":5}"#, &["`path`, byte 8: must be a string", "a number"][..]),
            (r#"{"content":["a"]}"#, &["`content`, byte 11: must be a string", "an array"]),
            (r#"{"content":"a","question":true}"#, &["`question`, byte 26: must be a string", "a boolean"]),
            (r#"{"content":"\ud800"}"#, &["`content`, byte 12: has the lone surrogate \\ud800"]),
            (r#"{"pth":"a"}"#, &["`pth`, byte 7: is an unknown field", "`path`, `content` and `question`"]),
            (r#"{"path":""}"#, &["`path` is empty"]),
            (r#"{"path":"a\u0000b"}"#, &["`path` contains U+0000"]),
            (r#"["a",null,null]"#, &["an object with `path`", "an array"]),
            (r#"{"path":"a""#, &["invalid JSON", "the end"]),
            (r#"{"path":"a"} x"#, &["invalid JSON", "the end must be here"]),
            ("", &["an object with `path`", "the end"]),
        ] {
            let error = error(body);
            assert!(parts.iter().all(|part| error.contains(part)), "{body}: {error}");
        }
        let long = format!(r#"{{"path":"{}"}}"#, "a".repeat(PATH_MAX + 1));
        assert!(error(&long).contains("`path` has more than 4095 bytes"));
        assert_eq!(
            error_of(b"{\"content\":\"\xe2\x82\"}"),
            "`content`, byte 12: is not UTF-8: send JSON in UTF-8"
        );
    }

    #[test]
    fn s9_a_bad_request_is_a_decode_error() {
        let error = HandlerError::from(RequestError::NoSubject);
        assert!(matches!(error, HandlerError::Decode(text) if text.contains("neither `path` nor `content`")));
    }
}
