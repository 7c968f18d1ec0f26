//! The flag `--tls-sni-cert-key`, read as kube-apiserver's.
//!
//! Input: its text. Output: files and names. Must never take a name that no client can ask for.

use std::{net::IpAddr, path::PathBuf, str::FromStr};

/// `CERT,KEY[:NAME,...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SniFiles {
    /// The certificate and its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The names and addresses it is shown for, `*.` for any label; none means the names the certificate holds.
    pub names: Vec<String>,
}

impl FromStr for SniFiles {
    type Err = String;

    /// As k8s.io/component-base/cli/flag/namedcertkey_flag.go, and names that no client can ask for are refused.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |what: &str| format!("`{text}` is not CERT,KEY[:NAME,...]: {what}");
        let (files, names) = match text.split_once(':') {
            Some((files, names)) => (files, Some(names.trim())),
            None => (text, None),
        };
        if names == Some("") {
            return Err(wrong("there is no name after the colon"));
        }
        let files: Vec<&str> = files.split(',').map(str::trim).collect();
        let [certificate, key] = files[..] else {
            return Err(wrong("there must be one certificate and one key before the names"));
        };
        if certificate.is_empty() || key.is_empty() {
            return Err(wrong("there must be one certificate and one key before the names"));
        }
        let names: Vec<String> = names
            .into_iter()
            .flat_map(|names| names.split(','))
            .map(|name| name.trim().to_owned())
            .collect();
        if let Some(name) = names
            .iter()
            .find(|name| !is_pattern(name) && name.parse::<IpAddr>().is_err())
        {
            return Err(wrong(&format!(
                "`{name}` is neither a DNS name, nor one with `*.` in front, nor an IP address"
            )));
        }
        Ok(Self {
            certificate: certificate.into(),
            key: key.into(),
            names,
        })
    }
}

fn is_pattern(name: &str) -> bool {
    let rest = name.strip_prefix("*.").unwrap_or(name);
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_'))
    };
    name == "*" || rest.split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_read_as_the_apiservers() {
        let read = |text: &str| text.parse::<SniFiles>();
        let files =
            read("/a.crt, /a.key: foo.example ,*.bar.example,192.0.2.1,2001:db8::1,*").expect("it is well-formed");
        assert_eq!((files.certificate, files.key), ("/a.crt".into(), "/a.key".into()));
        assert_eq!(
            files.names,
            ["foo.example", "*.bar.example", "192.0.2.1", "2001:db8::1", "*"]
        );
        assert_eq!(read("/a.crt,/a.key").expect("no names").names, [""; 0]);
        for wrong in [
            "/a.crt",
            "/a.crt,",
            ",/a.key",
            "/a,/b,/c",
            "/a.crt,/a.key:",
            "/a.crt,/a.key:a.*.b",
            "/a.crt,/a.key:..",
            "/a.crt,/a.key:x y",
        ] {
            assert!(read(wrong).is_err_and(|said| said.contains("CERT,KEY")), "{wrong}");
        }
    }
}
