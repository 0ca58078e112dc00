//! The body of `AnalyzeFile`: `{ "path": "...", "question"?: "..." }` or `{ "content": "...", "question"?: "..." }`.

use crate::server::HandlerError;
use serde::Deserialize;
use serde_json::value::RawValue;
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
    /// The body is no UTF-8.
    #[error("the request is not UTF-8 from byte {at} on: send JSON")]
    NotUtf8 {
        /// Offset of the first byte that begins no valid sequence.
        at: usize,
    },
    /// The body is no object of the known fields.
    #[error("the request is no object with `path` or `content`, and perhaps `question`: {0}")]
    NotAnObject(String),
    /// A field is no text.
    #[error("`{field}` must be a text: {problem}")]
    NotText {
        /// The field.
        field: &'static str,
        /// What it is instead, and where in the field.
        problem: String,
    },
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

/// The fields before their values are looked at, so that an error can name the field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    #[serde(borrow)]
    path: Option<&'a RawValue>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    question: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> AnalyzeRequest<'a> {
    /// Reads a request. A field that is `null` is as good as absent; one that is not known is an error, so that a
    /// misspelt one is noticed.
    ///
    /// Cost:   two passes over the body; a copy of a text only if it has escapes.
    ///
    /// # Errors
    ///
    /// [`RequestError`], naming the field.
    pub fn parse(body: &'a [u8]) -> Result<Self, RequestError> {
        let body = std::str::from_utf8(body).map_err(|e| RequestError::NotUtf8 { at: e.valid_up_to() })?;
        // An array would do for serde.
        if body.trim_start().starts_with('[') {
            return Err(RequestError::NotAnObject("it is an array".to_owned()));
        }
        let fields: Fields<'a> =
            serde_json::from_str(body).map_err(|e| RequestError::NotAnObject(e.to_string()))?;
        let subject = match (text("path", fields.path)?, text("content", fields.content)?) {
            (Some(path), None) => Subject::Path(checked(path)?),
            (None, Some(content)) => Subject::Content(content),
            (None, None) => return Err(RequestError::NoSubject),
            (Some(_), Some(_)) => return Err(RequestError::TwoSubjects),
        };
        Ok(Self { subject, question: text("question", fields.question)? })
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

fn text<'a>(field: &'static str, value: Option<&'a RawValue>) -> Result<Option<Cow<'a, str>>, RequestError> {
    let Some(value) = value else { return Ok(None) };
    match serde_json::from_str(value.get()) {
        Ok(Text(text)) => Ok(Some(text)),
        Err(error) => Err(RequestError::NotText { field, problem: error.to_string() }),
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
        AnalyzeRequest::parse(body.as_bytes()).unwrap_err().to_string()
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
            (r#"{"path":5}"#, &["`path` must be a text", "integer `5`"][..]),
            (r#"{"content":["a"]}"#, &["`content` must be a text", "sequence"]),
            (r#"{"content":"a","question":true}"#, &["`question` must be a text", "boolean"]),
            (r#"{"content":"\ud800"}"#, &["`content` must be a text", "hex escape"]),
            (r#"{"pth":"a"}"#, &["unknown field `pth`", "`path`, `content`, `question`"]),
            (r#"{"path":"a","path":"b"}"#, &["duplicate field `path`"]),
            (r#"{"path":""}"#, &["`path` is empty"]),
            (r#"{"path":"a\u0000b"}"#, &["`path` contains U+0000"]),
            (r#"["a",null,null]"#, &["no object with `path`", "array"]),
            (r#"{"path":"a""#, &["no object with `path`", "EOF"]),
            (r#"{"path":"a"} x"#, &["no object with `path`", "trailing"]),
            ("", &["no object with `path`"]),
        ] {
            let error = error(body);
            assert!(parts.iter().all(|part| error.contains(part)), "{body}: {error}");
        }
        let long = format!(r#"{{"path":"{}"}}"#, "a".repeat(PATH_MAX + 1));
        assert!(error(&long).contains("`path` has more than 4095 bytes"));
        assert_eq!(
            AnalyzeRequest::parse(b"{\"content\":\"\xe2\x82\"}"),
            Err(RequestError::NotUtf8 { at: 12 })
        );
    }

    #[test]
    fn s9_a_bad_request_is_a_decode_error() {
        let error = HandlerError::from(RequestError::NoSubject);
        assert!(matches!(error, HandlerError::Decode(text) if text.contains("neither `path` nor `content`")));
    }
}
