//! Configuration files: TOML, overridden by the environment. Errors say where they are and what is right.
//!
//! ```toml
//! [ipc]
//! max_connections = 200
//! policy = "block"
//!
//! [ai]
//! default = "local"
//!
//! [[ai.providers]]
//! name = "local"
//! kind = "openai"
//! base_url = "http://127.0.0.1:8080/v1"
//! models = ["*"]
//! ```
//!
//! A key `k` of `[ipc]` is overridden by the environment variable `DOORBELL_IPC_K`, and one of `[metrics]` by
//! `DOORBELL_METRICS_K`; its text is a value of TOML, and the quotes of a text may be left out.

use super::MetricsConfig;
use super::keys::{Ipc, KEYS, Key, METRICS_KEYS};
use crate::error::IpcError;
use crate::provider::ProvidersConfig;
use serde::Deserialize;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

/// What environment variables of the keys of `ipc` begin with.
pub const ENVIRONMENT: &str = "DOORBELL_IPC_";
/// What those of the keys of `metrics` begin with.
pub const METRICS_ENVIRONMENT: &str = "DOORBELL_METRICS_";

/// All that a configuration file can say.
#[derive(Debug, Clone, Default)]
pub struct ConfigFile {
    /// Section `ipc`.
    pub ipc: Ipc,
    /// Section `metrics`.
    pub metrics: MetricsConfig,
    /// Section `ai`.
    pub ai: ProvidersConfig,
}

/// What is wrong with a configuration, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFileError {
    /// The file, or the environment variable.
    pub source: String,
    /// Line and column, from 1; `None` in the environment.
    pub at: Option<(usize, usize)>,
    /// The key with its section, such as `ipc.reactors`; empty if the text is no TOML.
    pub key: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl std::error::Error for ConfigFileError {}

impl fmt::Display for ConfigFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        if let Some((line, column)) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl ConfigFile {
    /// Reads a file, then the environment, and checks the whole.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigFileError> {
        let variable = |name: &str| std::env::var_os(name);
        let Some(path) = path else { return Self::parse("", "", variable) };
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigFileError {
            source: name.clone(),
            at: None,
            key: String::new(),
            problem: format!("cannot be read: {error}: `doorbell config default` prints one to begin with"),
        })?;
        Self::parse(&text, &name, variable)
    }

    /// Reads the text of the file called `name`, then the environment that `variable` gives, and checks the whole.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn parse(
        text: &str,
        name: &str,
        variable: impl Fn(&str) -> Option<std::ffi::OsString>,
    ) -> Result<Self, ConfigFileError> {
        let mut reader = Reader { text, name, config: Self::default(), places: Vec::new() };
        reader.read()?;
        for key in KEYS {
            let name = format!("{ENVIRONMENT}{}", key.name.to_ascii_uppercase());
            if let Some(value) = variable(&name) {
                reader.override_key(IPC, key, name, &value)?;
            }
        }
        for key in METRICS_KEYS {
            let name = format!("{METRICS_ENVIRONMENT}{}", key.name.to_ascii_uppercase());
            if let Some(value) = variable(&name) {
                reader.override_key(METRICS, key, name, &value)?;
            }
        }
        reader.config.ipc.server.time_calls = reader.config.metrics.enable;
        reader.check()?;
        Ok(reader.config)
    }

    /// A file that says what holds without one, each key with a line about it.
    pub fn default_text() -> String {
        let mut text = String::from(
            "# Every key with its default. A key k is overridden by the environment variable DOORBELL_IPC_K, or\n\
             # DOORBELL_METRICS_K.\n\n[ipc]\n",
        );
        describe(&mut text, KEYS, &mut Ipc::default());
        text += "\n# What is counted, and who is told.\n[metrics]\n";
        describe(&mut text, METRICS_KEYS, &mut MetricsConfig::default());
        text += AI;
        text
    }
}

/// Every key of a section with its value and a line about it.
fn describe<T>(text: &mut String, keys: &[Key<T>], section: &mut T) {
    for key in keys {
        let value = (key.field)(section).to_toml();
        let line = value.map_or_else(|| format!("# {} = ...", key.name), |v| format!("{} = {v}", key.name));
        *text += &format!("# {}\n{line}\n", key.about);
    }
}

/// A section that has a table of its keys.
struct Section<T: 'static> {
    name: &'static str,
    keys: &'static [Key<T>],
    of: fn(&mut ConfigFile) -> &mut T,
}

const IPC: Section<Ipc> = Section { name: "ipc", keys: KEYS, of: |config| &mut config.ipc };
const METRICS: Section<MetricsConfig> =
    Section { name: "metrics", keys: METRICS_KEYS, of: |config| &mut config.metrics };

/// The section `ai` of the file with all defaults.
const AI: &str = r#"
# Who answers for models: here the loopback, which needs nothing and says in every answer that it is one.
[ai]
default = "loopback"
# The model that answers questions about files.
file_model = "loopback"

[[ai.providers]]
name = "loopback"
kind = "loopback"

# A service that speaks the OpenAI-compatible API; its key comes from the environment variable named here.
# [[ai.providers]]
# name = "openai"
# kind = "openai"
# base_url = "https://api.openai.com/v1"
# key_env = "OPENAI_API_KEY"
# models = ["gpt-*"]
"#;

struct Reader<'t> {
    text: &'t str,
    name: &'t str,
    config: ConfigFile,
    /// Where each key of `ipc` got its value.
    places: Vec<(&'static str, Place)>,
}

#[derive(Clone)]
enum Place {
    File(Range<usize>),
    Variable(String),
}

impl Reader<'_> {
    fn read(&mut self) -> Result<(), ConfigFileError> {
        let document = DeTable::parse(self.text)
            .map_err(|e| self.error(e.span().unwrap_or_default(), "", one_line(e.message())))?;
        for (section, value) in document.into_inner() {
            match section.get_ref().as_ref() {
                "ipc" => self.read_section(IPC, value)?,
                "metrics" => self.read_section(METRICS, value)?,
                "ai" => self.read_ai(value)?,
                other => {
                    let problem = unknown("section", other, &["ipc", "metrics", "ai"]);
                    return Err(self.error(section.span(), other, problem));
                }
            }
        }
        Ok(())
    }

    fn read_section<T>(
        &mut self,
        section: Section<T>,
        found: Spanned<DeValue<'_>>,
    ) -> Result<(), ConfigFileError> {
        let DeValue::Table(table) = found.get_ref() else {
            let wanted = format!("a section is wanted: [{}]", section.name);
            return Err(self.error(found.span(), section.name, wanted));
        };
        for (name, value) in table {
            let path = format!("{}.{}", section.name, name.get_ref());
            let Some(key) = section.keys.iter().find(|key| key.name == name.get_ref().as_ref()) else {
                let names: Vec<&str> = section.keys.iter().map(|key| key.name).collect();
                return Err(self.error(name.span(), &path, unknown("key", name.get_ref(), &names)));
            };
            (key.field)((section.of)(&mut self.config))
                .set(value.get_ref())
                .map_err(|problem| self.error(value.span(), &path, problem))?;
            self.places.push((key.name, Place::File(value.span())));
        }
        Ok(())
    }

    fn read_ai(&mut self, section: Spanned<DeValue<'_>>) -> Result<(), ConfigFileError> {
        let whole = section.span();
        self.config.ai = ProvidersConfig::deserialize(ValueDeserializer::from(section)).map_err(|e| {
            let span = e.span().unwrap_or_else(|| whole.clone());
            let problem = with_nearest(e.message());
            self.error(span.clone(), &self.key_at(&span), problem)
        })?;
        self.config.ai.check().map_err(|fault| self.error(whole, "ai", fault.to_string()))
    }

    /// The key that a value stands behind, as far as its line tells.
    fn key_at(&self, span: &Range<usize>) -> String {
        let start = self.text[..span.start].rfind('\n').map_or(0, |at| at + 1);
        let before = self.text[start..].split('=').next().unwrap_or_default().trim();
        let is_key = !before.is_empty() && before.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if is_key { format!("ai.{before}") } else { "ai".to_owned() }
    }

    fn override_key<T>(
        &mut self,
        section: Section<T>,
        key: &'static Key<T>,
        variable: String,
        value: &std::ffi::OsStr,
    ) -> Result<(), ConfigFileError> {
        let error = |problem: String| ConfigFileError {
            source: format!("environment variable {variable}"),
            at: None,
            key: format!("{}.{}", section.name, key.name),
            problem,
        };
        let text = value.to_str().ok_or_else(|| error("is no UTF-8 text".to_owned()))?;
        let string = DeValue::String(text.into());
        let parsed = DeValue::parse(text).map(Spanned::into_inner);
        let value = parsed.as_ref().unwrap_or(&string);
        (key.field)((section.of)(&mut self.config)).set(value).map_err(error)?;
        self.places.push((key.name, Place::Variable(variable)));
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigFileError> {
        let problem = match self.config.ipc.server.check() {
            Ok(()) => return Ok(()),
            Err(IpcError::Config(problem)) => problem,
            Err(other) => other.to_string(),
        };
        // It begins with the name of the limit, its unit in brackets.
        let limit = problem.split(' ').next().unwrap_or_default();
        let is_it =
            |key: &str| key == limit || key.strip_prefix(limit).is_some_and(|unit| unit.starts_with('_'));
        let key = KEYS.iter().map(|key| key.name).find(|name| is_it(name)).unwrap_or(limit);
        let path = format!("ipc.{key}");
        // Who set it last is who is wrong.
        match self.places.iter().rfind(|(name, _)| *name == key) {
            Some((_, Place::File(span))) => Err(self.error(span.clone(), &path, problem)),
            Some((_, Place::Variable(variable))) => Err(ConfigFileError {
                source: format!("environment variable {variable}"),
                at: None,
                key: path,
                problem,
            }),
            None => Err(self.error(0..0, &path, problem)),
        }
    }

    fn error(&self, span: Range<usize>, key: &str, problem: String) -> ConfigFileError {
        let before = &self.text[..span.start.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        ConfigFileError {
            source: self.name.to_owned(),
            at: Some((line, column)),
            key: key.to_owned(),
            problem,
        }
    }
}

fn unknown(what: &str, name: &str, names: &[&str]) -> String {
    match nearest(name, names) {
        Some(near) => format!("there is no such {what}: is `{near}` meant?"),
        None => format!("there is no such {what}; there are {}", names.join(", ")),
    }
}

/// The name that is most like `name`, if any is.
fn nearest<'n>(name: &str, names: &[&'n str]) -> Option<&'n str> {
    let likeness = |other: &&str| (strsim::normalized_damerau_levenshtein(name, other) * 1000.0) as u32;
    names.iter().copied().max_by_key(|other| likeness(other)).filter(|other| likeness(other) >= 600)
}

/// serde's words for an unknown field or variant, and the nearest of those that there are.
fn with_nearest(message: &str) -> String {
    let message = one_line(message);
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match names.split_first() {
        Some((name, others)) if message.starts_with("unknown") => match nearest(name, others) {
            Some(near) => format!("there is no `{name}`: is `{near}` meant?"),
            None => message,
        },
        _ => message,
    }
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// The place of the socket: of the configuration, or the default one.
pub fn socket_path(config: &ConfigFile) -> PathBuf {
    config.ipc.socket_path.clone().unwrap_or_else(crate::default_socket_path)
}
