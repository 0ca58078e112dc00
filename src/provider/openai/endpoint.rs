//! Where an API is.

use hyper::Uri;
use hyper::header::HeaderValue;

/// A base URL, taken apart.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub is_tls: bool,
    /// A name or an address, without brackets.
    pub host: String,
    pub port: u16,
    pub host_header: HeaderValue,
    /// Without a slash at its end.
    prefix: String,
}

impl Endpoint {
    /// Takes a base URL apart; says what is wrong with it.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let uri: Uri = url
            .trim()
            .parse()
            .map_err(|_invalid| "is no URL: write for example https://api.openai.com/v1")?;
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err("has to begin with http:// or https://"),
        };
        let authority = uri.authority().ok_or("names no host")?;
        if authority.as_str().contains('@') {
            return Err("carries a user or password: put the key into the variable that key_env names");
        }
        if uri.query().is_some() {
            return Err("has a query, which does not belong to a base URL");
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err("names no host");
        }
        let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let host_header = HeaderValue::from_str(authority.as_str()).map_err(|_invalid| "names no host")?;
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Self { is_tls, host, port, host_header, prefix })
    }

    /// The path of a request, which begins with a slash and has nothing that is to be escaped.
    pub fn path(&self, path: &str) -> Uri {
        // The prefix has been part of a URI, so this is one; were it not, the root would answer 404.
        Uri::try_from(format!("{}{path}", self.prefix)).unwrap_or_default()
    }

    /// Whether it is on this machine.
    pub fn is_local(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   base URLs are taken apart, and refused with what is wrong.
    #[test]
    fn r2_7_base_urls_are_taken_apart() {
        let parsed =
            |url| Endpoint::parse(url).map(|e| (e.is_tls, e.host.clone(), e.port, e.path("/x").to_string()));
        let right = |tls, host: &str, port, path: &str| Ok((tls, host.to_owned(), port, path.to_owned()));
        assert_eq!(parsed("https://api.openai.com/v1/"), right(true, "api.openai.com", 443, "/v1/x"));
        assert_eq!(parsed("http://127.0.0.1:8080"), right(false, "127.0.0.1", 8080, "/x"));
        assert_eq!(parsed("http://[::1]:99/a/b"), right(false, "::1", 99, "/a/b/x"));
        for (url, word) in [
            ("", "URL"),
            ("api.openai.com/v1", "URL"),
            ("/v1", "begin"),
            ("ftp://h/", "begin"),
            ("https://key@h/", "key_env"),
            ("https://h/?a=b", "query"),
        ] {
            assert!(parsed(url).unwrap_err().contains(word), "{url}");
        }
        assert!(Endpoint::parse("http://[::1]:99/").unwrap().is_local());
        assert!(!Endpoint::parse("http://10.0.0.1/").unwrap().is_local());
    }
}
