//! JSON inside of messages that is passed through as it is.

use crate::codec::{DecodeError, check_json};
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// JSON that is passed through byte for byte: order of keys, big integers, duplicate keys and lone surrogates included.
///
/// It is JSON of limited depth ([`DEPTH_MAX`](crate::codec::DEPTH_MAX)), always: wherever it comes from, it is checked.
/// Two are equal if their texts are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RawJson(Box<str>);

impl RawJson {
    /// Takes JSON text as it is.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and where, if it is no JSON or nested too deeply.
    pub fn new(text: String) -> Result<Self, DecodeError> {
        check_json(&text)?;
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn get(&self) -> &str {
        &self.0
    }
}

/// [`RawJson`] that is borrowed from a body, if it can be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RawJsonRef<'a>(Cow<'a, str>);

impl<'a> RawJsonRef<'a> {
    /// What has been checked to be JSON of limited depth.
    pub(crate) fn checked(text: &'a str) -> Self {
        Self(Cow::Borrowed(text))
    }

    /// The text.
    pub fn get(&self) -> &str {
        &self.0
    }

    /// The same, with memory of its own.
    pub fn into_owned(self) -> RawJson {
        RawJson(self.0.into())
    }
}

impl From<RawJson> for RawJsonRef<'static> {
    fn from(raw: RawJson) -> Self {
        Self(Cow::Owned(raw.0.into()))
    }
}

impl Serialize for RawJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_str(&self.0).map_err(S::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        check_json(raw.get()).map_err(D::Error::custom)?;
        Ok(Self(raw.into()))
    }
}

/// Reads a field that is there, be it `null`: an absent one is left to `#[serde(default)]`.
pub(super) fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RawJson>, D::Error> {
    RawJson::deserialize(deserializer).map(Some)
}

#[cfg(feature = "rkyv")]
mod archived {
    use super::RawJson;
    use rkyv::rancor::{Fallible, Source};
    use rkyv::ser::Writer;
    use rkyv::string::{ArchivedString, StringResolver};
    use rkyv::{Archive, Deserialize, Place, Serialize, SerializeUnsized};

    /// An archive has the text; whoever takes it out has it checked.
    impl Archive for RawJson {
        type Archived = ArchivedString;
        type Resolver = StringResolver;

        fn resolve(&self, resolver: Self::Resolver, out: Place<Self::Archived>) {
            ArchivedString::resolve_from_str(&self.0, resolver, out);
        }
    }

    impl<S> Serialize<S> for RawJson
    where
        S: Fallible<Error: Source> + Writer + ?Sized,
        str: SerializeUnsized<S>,
    {
        fn serialize(&self, serializer: &mut S) -> Result<Self::Resolver, S::Error> {
            ArchivedString::serialize_from_str(&self.0, serializer)
        }
    }

    impl<D: Fallible<Error: Source> + ?Sized> Deserialize<RawJson, D> for ArchivedString {
        fn deserialize(&self, _: &mut D) -> Result<RawJson, D::Error> {
            RawJson::new(self.as_str().to_owned()).map_err(Source::new)
        }
    }
}
