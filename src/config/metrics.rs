//! Where counters are told: the section `metrics`.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Where and how often a server tells what it has counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Whether calls are timed and anything is told.
    pub enable: bool,
    /// Between two lines in the log, and two versions of the text file; `None` for neither.
    pub export_interval: Option<Duration>,
    /// A file that the text for Prometheus is written to; each version replaces the one before as a whole.
    pub textfile: Option<PathBuf>,
    /// Where the text is served by HTTP, at `/metrics`.
    pub listen: Option<MetricsAddress>,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { enable: true, export_interval: Some(Duration::from_secs(60)), textfile: None, listen: None }
    }
}

/// Where metrics are served: never beyond this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsAddress {
    /// A loopback address. Every user of the machine can read what is served there.
    Tcp(SocketAddr),
    /// A unix socket, for the server's own user alone.
    Unix(PathBuf),
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = Path::new(path);
            return match path.is_absolute() {
                true => Ok(Self::Unix(path.to_owned())),
                false => Err(format!("`{text}` is no absolute path: write unix:/run/..., for example")),
            };
        }
        // `localhost` may be anything: it is not looked up.
        let address: SocketAddr = text.parse().map_err(|_| {
            format!("`{text}` is no address: write 127.0.0.1:9464, [::1]:9464 or unix:/path, for example")
        })?;
        match address.ip().is_loopback() {
            true => Ok(Self::Tcp(address)),
            false => Err(format!(
                "{} is no loopback address: metrics are served on this machine only; put a proxy before it to serve \
                 them to others",
                address.ip()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   R4.6: metrics are served on this machine only, and an address that says otherwise is refused with a
    ///         reason.
    #[test]
    fn r4_6_addresses_are_of_this_machine() {
        for good in ["127.0.0.1:9464", "127.9.9.9:1", "[::1]:0", "unix:/run/user/1/metrics"] {
            assert_eq!(good.parse::<MetricsAddress>().unwrap().to_string(), good);
        }
        for (bad, why) in [
            ("0.0.0.0:9464", "no loopback"),
            ("[::]:9464", "no loopback"),
            ("192.168.0.1:80", "no loopback"),
            ("localhost:9464", "no address"),
            ("9464", "no address"),
            ("unix:metrics", "no absolute path"),
        ] {
            assert!(bad.parse::<MetricsAddress>().unwrap_err().contains(why), "{bad}");
        }
    }
}
