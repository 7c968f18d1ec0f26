//! The flag for more certificates, of any text: files and names as kube-apiserver reads them
//! (k8s.io/component-base/cli/flag/namedcertkey_flag.go), names that a client can ask for, or a refusal that says what is
//! wrong.
#![no_main]

#[path = "../../rebalancer/src/relay/sni/flag.rs"]
mod flag;

use std::net::IpAddr;

use flag::SniFiles;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let read = match text.parse::<SniFiles>() {
        Ok(read) => read,
        Err(said) => return assert!(said.contains("CERT,KEY") && said.len() < 200 + 2 * text.len()),
    };
    // Go's: what is before the first colon are two files, what is behind it are names, each without white space around it.
    let (files, names) = text
        .split_once(':')
        .map_or((text, None), |(files, names)| (files, Some(names)));
    let files: Vec<&str> = files.split(',').map(str::trim).collect();
    assert_eq!(files.len(), 2);
    assert_eq!(
        (read.certificate.to_str(), read.key.to_str()),
        (Some(files[0]), Some(files[1]))
    );
    assert!(!files[0].is_empty() && !files[1].is_empty());
    let named: Vec<&str> = names.map_or(Vec::new(), |names| names.trim().split(',').map(str::trim).collect());
    assert_eq!(read.names, named);
    for name in &read.names {
        let labels = name.strip_prefix("*.").unwrap_or(name);
        let is_name = name == "*" || !labels.contains('*') && labels.split('.').all(|label| !label.is_empty());
        assert!(is_name || name.parse::<IpAddr>().is_ok(), "{name}");
    }
    let again = format!("{},{}", files[0], files[1]);
    let again = if named.is_empty() {
        again
    } else {
        format!("{again}:{}", named.join(","))
    };
    assert_eq!(again.parse::<SniFiles>().as_ref(), Ok(&read));
});
