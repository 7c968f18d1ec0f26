//! Certificate chains of every shape, judged by Go's crypto/x509 and by the relay: there is no difference.

use std::{net::IpAddr, path::Path, process::Command, time::Duration};

use rebalancer::relay::trust::{AwsLc, ServerCertificates};
use rebalancer_core::wire::x509::{Certificate, Pool, PublicKey, Purpose, Refused, Verified, verify};
use rebalancer_tests::skip;
use rustls::{
    client::danger::ServerCertVerifier as _,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use serde::Deserialize;

/// One chain and what Go says of it (tests/go/chains).
#[derive(Deserialize)]
struct Judged {
    name: String,
    roots: Option<Vec<String>>,
    chain: Vec<String>,
    now: i64,
    verdict: String,
    error: String,
    until: i64,
    /// The same chain as a server's: how long it is good, 0 when it is refused.
    server_until: i64,
    /// For which of [`HOSTS`] it is then.
    hosts: Option<Vec<String>>,
    user: String,
    groups: Option<Vec<String>>,
    uids: Option<Vec<String>>,
}

/// The relay's word for the same: verdict, the path's end, user, groups, UIDs.
type Word = (&'static str, i64, String, Vec<String>, Vec<String>);

/// Whom a server may be asked for (tests/go/chains/main.go has the same).
const HOSTS: [&str; 8] = [
    "example.com",
    "www.example.com",
    "WWW.Example.Com.",
    "a.www.example.com",
    "a.b",
    "other",
    "10.0.0.1",
    "::",
];

/// What the relay says of the chain when the apiserver shows it: how long it is good, and for which hosts.
fn judge_server(case: &Judged) -> (i64, Vec<String>) {
    let refused = (0, Vec::new());
    let (Some(roots), Some(mut chain)) = (parse(case.roots.as_deref().unwrap_or_default()), parse(&case.chain)) else {
        return refused;
    };
    let leaf = chain.remove(0);
    let Ok(verified) = path(case, &leaf, chain, roots, Purpose::Server) else {
        return refused;
    };
    let is_for = |host: &&str| match host.parse::<IpAddr>() {
        Ok(address) => leaf.is_for_address(address),
        Err(_) => leaf.is_for_host(host),
    };
    (
        verified.until,
        HOSTS.into_iter().filter(is_for).map(str::to_owned).collect(),
    )
}

/// For which hosts the chain is taken by the verifier that the relay's own connections have, and whether its keys are of
/// kinds that a handshake ends at, which Go's client does too (crypto/tls/handshake_client.go, `verifyServerCertificate`).
/// One that is good for nobody is asked for one host only: each time costs signatures.
fn verified(case: &Judged) -> Option<(Vec<String>, bool)> {
    let roots = parse(case.roots.as_deref().unwrap_or_default())?;
    let verifier = ServerCertificates::new(Pool::new(roots));
    let chain: Vec<CertificateDer<'_>> = case.chain.iter().map(|text| unhex(text).into()).collect();
    let (leaf, others) = chain.split_first()?;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(case.now).expect("after 1970")));
    let hosts = if case.server_until > 0 { &HOSTS[..] } else { &HOSTS[..1] };
    let takes = |host: &&&str| {
        let name = ServerName::try_from(**host).expect("a name or an address");
        verifier.verify_server_cert(leaf, others, &name, &[], now).is_ok()
    };
    let hosts = hosts.iter().filter(takes).map(|host| (*host).to_owned()).collect();
    let parsed = parse(&case.chain).unwrap_or_default();
    let is_ended = parsed
        .first()
        .is_some_and(|leaf| matches!(leaf.key(), PublicKey::Dsa | PublicKey::Unknown))
        || parsed.iter().any(|one| one.key().rsa_bits() > Some(8192));
    Some((hosts, is_ended))
}

/// The relay's path from that leaf to the roots, at the case's time.
fn path(
    case: &Judged,
    leaf: &Certificate,
    others: Vec<Certificate>,
    roots: Vec<Certificate>,
    purpose: Purpose,
) -> Result<Verified, Refused> {
    let now = i128::from(case.now) * 1_000_000_000;
    verify(leaf, &Pool::new(others), &Pool::new(roots), purpose, now, &AwsLc)
}

fn parse(texts: &[String]) -> Option<Vec<Certificate>> {
    texts
        .iter()
        .map(|text| Certificate::parse(&unhex(text), &AwsLc).ok())
        .collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |octet: u8| char::from(octet).to_digit(16).expect("hexadecimal") as u8;
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        panic!("half an octet")
    };
    pairs
        .iter()
        .map(|[high, low]| digit(*high) << 4 | digit(*low))
        .collect()
}

fn judge(case: &Judged) -> Word {
    let nobody = |verdict| (verdict, 0, String::new(), Vec::new(), Vec::new());
    let Some(roots) = parse(case.roots.as_deref().unwrap_or_default()) else {
        return nobody("roots");
    };
    let Some(mut chain) = parse(&case.chain) else {
        return nobody("chain");
    };
    let leaf = chain.remove(0);
    let (verdict, until) = match path(case, &leaf, chain, roots, Purpose::Client) {
        Ok(verified) => ("good", verified.until),
        Err(_) => ("refused", 0),
    };
    let owned = |text: &str| text.to_owned();
    let name = leaf.name();
    (
        verdict,
        until,
        name.common_name().to_owned(),
        name.organizations().map(owned).collect(),
        name.uids().map(owned).collect(),
    )
}

#[test]
fn every_chain_is_judged_as_go_judges_it() {
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("go/chains");
    let go = match Command::new("go").args(["run", "."]).current_dir(module).output() {
        Ok(output) => output,
        Err(error) => return skip(&format!("there is no `go` on PATH to judge certificates with: {error}")),
    };
    assert!(go.status.success(), "{}", String::from_utf8_lossy(&go.stderr));
    let mut differences = Vec::new();
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    let (mut counts_of_hosts, mut verified_hosts) = (0, 0);
    for line in go.stdout.split(|octet| *octet == b'\n').filter(|line| !line.is_empty()) {
        let case: Judged = serde_json::from_slice(line).expect("a chain and a verdict");
        let go = (
            case.verdict.as_str(),
            case.until,
            case.user.clone(),
            case.groups.clone().unwrap_or_default(),
            case.uids.clone().unwrap_or_default(),
        );
        let ours = judge(&case);
        if ours != go {
            differences.push(format!(
                "{}: Go says {go:?} ({}), the relay {ours:?}",
                case.name, case.error
            ));
        }
        let go = (case.server_until, case.hosts.clone().unwrap_or_default());
        let ours = judge_server(&case);
        if ours != go {
            differences.push(format!(
                "{} as a server's: Go says {go:?}, the relay {ours:?}",
                case.name
            ));
        }
        if let Some((hosts, is_ended)) = verified(&case) {
            verified_hosts += hosts.len();
            let expected = if is_ended { Vec::new() } else { go.1.clone() };
            if hosts != expected {
                differences.push(format!(
                    "{} at the relay's own handshake: Go takes it for {expected:?}, the relay for {hosts:?}",
                    case.name
                ));
            }
        }
        if go.0 > 0 {
            *counts.entry("good as a server's".to_owned()).or_default() += 1;
            counts_of_hosts += go.1.len();
        }
        *counts.entry(case.verdict).or_default() += 1;
    }
    let count: usize = counts
        .iter()
        .filter(|(verdict, _)| !verdict.contains("server"))
        .map(|(_, count)| count)
        .sum();
    println!(
        "{count} chains judged by Go and by the relay, {} differences: {counts:?}",
        differences.len()
    );
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    // Each verdict is there in numbers: the corpus is not one-sided.
    assert!(counts_of_hosts > 200, "{counts_of_hosts} hosts that a server may be");
    assert!(verified_hosts > 200, "{verified_hosts} of them by the verifier");
    for verdict in ["good", "refused", "chain", "roots", "good as a server's"] {
        assert!(
            counts.get(verdict).is_some_and(|count| *count > 300),
            "{verdict}: {counts:?}"
        );
    }
}
