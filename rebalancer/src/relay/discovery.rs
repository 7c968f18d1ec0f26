//! What the apiserver says of itself: ConfigMap kube-system/extension-apiserver-authentication
//! (k8s.io/kubernetes/pkg/controlplane/controller/clusterauthenticationtrust), where every kube-apiserver writes whom it
//! believes and under which names front proxies tell it who asks.
//!
//! Job: compare it with this relay's flags. Input: the ConfigMap's data. Output: what does not fit, as a sentence.
//! Must never let the relay run where a client could name itself to the apiserver, or where it would name somebody for a
//! certificate the apiserver does not believe.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use http::{StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use rebalancer_core::wire::x509::{Certificate, Pool, Purpose, verify};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::{
    request_headers::RequestHeaders,
    tls::Files,
    trust::{self, Authorities, AwsLc, PROXY_CA, certificates},
    unix_now,
    upstream::{RULES, Target},
};

const PATH: &str = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication";

/// Whom the relay says it is: a user that has no rights unless somebody gives it the Role
/// `extension-apiserver-authentication-reader`.
pub const USER: &str = "rebalancer-relay";

/// The name that kube-apiserver has for UIDs.
const UID: &str = "X-Remote-Uid";

/// How long one look may take.
const LOOK: Duration = Duration::from_secs(3);

/// How long to wait for an apiserver that does not answer yet.
const AGAIN: Duration = Duration::from_secs(2);

/// A ConfigMap has 1 MiB at most.
const LARGEST: usize = 2 << 20;

#[derive(Debug, Default, Deserialize)]
struct ConfigMap {
    #[serde(default)]
    data: BTreeMap<String, String>,
}

/// What a look brought.
enum Look {
    Read(ConfigMap),
    /// The apiserver answers, and not that.
    Refused {
        status: StatusCode,
        /// It said of itself that it is ready, and so knows its rules.
        is_ready: bool,
    },
}

/// Since when an apiserver refuses to say whether it is ready, if it does.
pub type Forbidden = Option<Instant>;

/// Compares until something can be said; an apiserver that is not ready is asked again.
///
/// # Errors
///
/// What does not fit.
pub async fn check(target: &Target, headers: &RequestHeaders, mut forbidden: Forbidden) -> anyhow::Result<()> {
    while !check_once(target, headers, &mut forbidden).await? {
        sleep(AGAIN).await;
    }
    Ok(())
}

/// Compares, if the apiserver is ready and says what its flags are; whether there is nothing more to ask.
///
/// # Errors
///
/// What does not fit.
pub async fn check_once(target: &Target, headers: &RequestHeaders, forbidden: &mut Forbidden) -> anyhow::Result<bool> {
    match timeout(LOOK, look(target, headers)).await {
        Ok(Ok(Look::Read(map))) => {
            for warning in compare(&map.data, headers, &target.tls.current().authorities)? {
                tracing::warn!("{warning}");
            }
            tracing::info!("compared with ConfigMap kube-system/extension-apiserver-authentication: everything fits");
            return Ok(true);
        }
        // One that has just begun to listen lets nobody do anything before it knows its rules.
        Ok(Ok(Look::Refused { is_ready: false, .. }))
            if forbidden.get_or_insert_with(Instant::now).elapsed() < RULES =>
        {
            tracing::debug!("the apiserver does not say yet whether it is ready");
        }
        Ok(Ok(Look::Refused { status, .. })) => {
            tracing::info!(
                %status,
                user = USER,
                "ConfigMap kube-system/extension-apiserver-authentication cannot be read, so that --requestheader-* and \
                 --client-ca are not compared with the apiserver's; bind that user to Role \
                 extension-apiserver-authentication-reader to have them compared"
            );
            return Ok(true);
        }
        Ok(Err(error)) => tracing::debug!(error = format!("{error:#}"), "the apiserver cannot say its flags yet"),
        Err(_) => tracing::debug!("the apiserver does not answer what its flags are"),
    }
    Ok(false)
}

/// Asks on one connection whether the apiserver is ready, before which it refuses what it will allow, and then for the
/// ConfigMap.
async fn look(target: &Target, headers: &RequestHeaders) -> anyhow::Result<Look> {
    let stream = target.connect(&target.tls.current().front_proxy, b"http/1.1").await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let [username, ..] = headers.written();
    let request = |path: &str| {
        http::Request::get(path)
            .header(header::HOST, target.name.to_str().as_ref())
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("rebalancer/", env!("CARGO_PKG_VERSION")))
            .header(&username, USER)
            .body(Empty::<bytes::Bytes>::new())
    };
    let requests = [request("/readyz")?, request(PATH)?];
    let asked = async move {
        let mut is_ready = false;
        let mut last = None;
        for request in requests {
            sender.ready().await?;
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let says_nothing = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS);
            anyhow::ensure!(!status.is_server_error() && !says_nothing, "it answers {status}");
            let body = Limited::new(answer.into_body(), LARGEST).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
            is_ready |= last.is_none() && status == StatusCode::OK;
            last = Some((status, body));
        }
        match last {
            Some((StatusCode::OK, body)) => Ok(Look::Read(
                serde_json::from_slice(&body).context("that is no ConfigMap")?,
            )),
            Some((status, _)) => Ok(Look::Refused { status, is_ready }),
            None => anyhow::bail!("nothing was asked"),
        }
    };
    let (look, _) = tokio::join!(asked, connection);
    look
}

/// Compares a relay's files and headers with what an apiserver's flags say, by the names they have in that ConfigMap:
/// without a relay, and without asking anybody.
///
/// # Errors
///
/// What does not fit.
pub fn compare_files(
    data: &BTreeMap<String, String>,
    headers: &RequestHeaders,
    files: &Files,
) -> anyhow::Result<Vec<String>> {
    let authorities = Authorities::load(&files.client_ca, files.proxy_ca.as_deref(), Arc::new(headers.clone()))?;
    compare(data, headers, &authorities)
}

/// Whether an apiserver with such flags believes a front-proxy certificate
/// (k8s.io/apiserver/pkg/authentication/request/x509/x509.go, `Verifier`).
///
/// # Errors
///
/// Why not.
pub fn believes(data: &BTreeMap<String, String>, certificate: &Path) -> anyhow::Result<()> {
    let text = data
        .get("requestheader-client-ca-file")
        .context("the apiserver has no --requestheader-client-ca-file")?;
    let mut shown = Vec::new();
    for der in certificates(certificate, "--proxy-client-cert")? {
        shown.push(Certificate::parse(&der, &AwsLc)?);
    }
    let leaf = shown.remove(0);
    let (others, roots) = (Pool::new(shown), bundle(text)?);
    verify(&leaf, &others, &roots, Purpose::Client, trust::now_ns(), &AwsLc)?;
    let allowed = list(data, "requestheader-allowed-names")?.unwrap_or_default();
    let name = leaf.name().common_name();
    anyhow::ensure!(
        allowed.is_empty() || allowed.iter().any(|one| one == name),
        "it is for `{name}`, and the apiserver believes only {}",
        allowed.join(",")
    );
    Ok(())
}

/// What is worth a warning; what does not fit is an error.
fn compare(
    data: &BTreeMap<String, String>,
    headers: &RequestHeaders,
    authorities: &Authorities,
) -> anyhow::Result<Vec<String>> {
    let mut warnings = Vec::new();
    for (key, ours, must_be_read) in [
        ("requestheader-username-headers", &headers.username, true),
        ("requestheader-group-headers", &headers.group, true),
        ("requestheader-uid-headers", &headers.uid, false),
        ("requestheader-extra-headers-prefix", &headers.extra_prefix, true),
    ] {
        let theirs = list(data, key)?;
        let has = |names: &[String], name: &str| names.iter().any(|one| one.eq_ignore_ascii_case(name));
        let first = ours.first().map_or("", String::as_str);
        // Only UIDs may be missing where anything is: front proxies are not believed at all then.
        if !must_be_read && !theirs.as_ref().is_some_and(|theirs| has(theirs, first)) {
            // kube-apiserver takes no list without the standard name (pkg/kubeapiserver/options/authentication.go).
            let list = if first.eq_ignore_ascii_case(UID) {
                UID.to_owned()
            } else {
                format!("{UID},{first}")
            };
            warnings.push(format!(
                "--{key}: the apiserver does not read `{first}`, and clients' certificates lose their UIDs on the way to it; from \
                 Kubernetes 1.33 on, give kube-apiserver --{key}={list}"
            ));
        }
        let Some(theirs) = theirs else { continue };
        if let Some(unknown) = theirs.iter().find(|name| !has(ours, name)) {
            anyhow::bail!(
                "--{key} {}: the apiserver also believes `{unknown}` (ConfigMap extension-apiserver-authentication), which a \
                 client could send through this relay; give the apiserver's own list: {}",
                ours.join(","),
                theirs.join(",")
            );
        }
        if must_be_read && !has(&theirs, first) {
            anyhow::bail!(
                "--{key} {}: the apiserver does not read `{first}`; give its own list: {}",
                ours.join(","),
                theirs.join(",")
            );
        }
    }
    let allowed = list(data, "requestheader-allowed-names")?.unwrap_or_default();
    let beyond = headers.allowed_names.iter().find(|name| !allowed.contains(name));
    if authorities.certificates().any(|(flag, _)| flag == PROXY_CA)
        && !allowed.is_empty()
        && (headers.allowed_names.is_empty() || beyond.is_some())
    {
        anyhow::bail!(
            "--requestheader-allowed-names {}: the apiserver believes only {}; give its own list",
            headers.allowed_names.join(","),
            allowed.join(",")
        );
    }
    if data.contains_key("client-ca-file") && !data.contains_key("requestheader-client-ca-file") {
        anyhow::bail!(
            "the apiserver has no --requestheader-client-ca-file (ConfigMap extension-apiserver-authentication): it does not \
             believe --proxy-client-cert, and every client with a certificate would be answered 401"
        );
    }
    // The apiserver leaves expired ones out when it writes (filterExpiredCerts); they vouch for nobody here either.
    let now = i64::try_from(unix_now()).unwrap_or(i64::MAX);
    for (flag, key) in [
        ("--client-ca", "client-ca-file"),
        (PROXY_CA, "requestheader-client-ca-file"),
    ] {
        let ours: Vec<&Certificate> = authorities
            .certificates()
            .filter(|(of, _)| *of == flag)
            .map(|(_, one)| one)
            .filter(|one| now <= one.validity().1)
            .collect();
        let Some(text) = data.get(key).filter(|_| !ours.is_empty()) else {
            continue;
        };
        let theirs = bundle(text).with_context(|| format!("the ConfigMap's {key}"))?;
        let among = |one: &Certificate, all: &[Certificate]| all.iter().any(|other| other.raw() == one.raw());
        if let Some(unknown) = ours.iter().find(|one| !among(one, theirs.certificates())) {
            anyhow::bail!(
                "{flag}: the apiserver does not believe the authority `{}` in it (ConfigMap extension-apiserver-authentication, \
                 {key}), and this relay would name whoever has a certificate of it; give the apiserver's own file",
                unknown.name().common_name()
            );
        }
        for missing in theirs
            .certificates()
            .iter()
            .filter(|one| now <= one.validity().1)
            .filter(|one| !ours.iter().any(|ours| ours.raw() == one.raw()))
        {
            warnings.push(format!(
                "{flag}: the authority `{}`, which an apiserver of this cluster believes, is not in it: whoever has a \
                 certificate of it is answered 401 here",
                missing.name().common_name()
            ));
        }
    }
    Ok(warnings)
}

/// A list of the ConfigMap's, which is JSON.
fn list(data: &BTreeMap<String, String>, key: &str) -> anyhow::Result<Option<Vec<String>>> {
    let Some(text) = data.get(key) else { return Ok(None) };
    let list: Option<Vec<String>> =
        serde_json::from_str(text).with_context(|| format!("the ConfigMap's {key} is not a list of names"))?;
    Ok(Some(list.unwrap_or_default()))
}

fn bundle(text: &str) -> anyhow::Result<Pool> {
    let ders: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>()?;
    let parsed: Result<Vec<Certificate>, _> = ders.iter().map(|der| Certificate::parse(der, &AwsLc)).collect();
    Ok(Pool::new(parsed?))
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc};

    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, date_time_ymd};

    use super::*;

    fn authority(name: &str) -> String {
        authority_until(name, 4096)
    }

    fn authority_until(name: &str, year: i32) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_after = date_time_ymd(year, 1, 1);
        params
            .self_signed(&KeyPair::generate().expect("a key"))
            .expect("a certificate")
            .pem()
    }

    #[test]
    fn whatever_would_let_a_client_name_itself_is_refused_and_kubeadms_own_is_not() {
        let (users, proxies, other) = (authority("users"), authority("proxies"), authority("other"));
        let directory = tempfile::tempdir().expect("a directory");
        let load = |user_bundle: &str, proxy_bundle: Option<&str>, headers: &RequestHeaders| {
            let write = |name: &str, text: &str| {
                let path = directory.path().join(name);
                fs::write(&path, text).expect("a file");
                path
            };
            let users = write("users", user_bundle);
            let proxies = proxy_bundle.map(|text| write("proxies", text));
            Authorities::load(&users, proxies.as_deref(), Arc::new(headers.clone())).expect("bundles")
        };
        // As kubeadm has it: no UIDs, one allowed name.
        let mut kubeadm: BTreeMap<String, String> = [
            ("client-ca-file", users.as_str()),
            ("requestheader-client-ca-file", proxies.as_str()),
            ("requestheader-username-headers", r#"["X-Remote-User"]"#),
            ("requestheader-group-headers", r#"["X-Remote-Group"]"#),
            ("requestheader-extra-headers-prefix", r#"["X-Remote-Extra-"]"#),
            ("requestheader-allowed-names", r#"["front-proxy-client"]"#),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let default = RequestHeaders::default();
        let warnings = compare(&kubeadm, &default, &load(&users, None, &default)).expect("kubeadm's own fits");
        assert!(warnings.len() == 1 && warnings[0].contains("kube-apiserver --requestheader-uid-headers=X-Remote-Uid"));
        kubeadm.insert("requestheader-uid-headers".to_owned(), r#"["X-Remote-Uid"]"#.to_owned());
        let ok = compare(&kubeadm, &default, &load(&users, None, &default)).expect("the same with UIDs");
        assert!(ok.is_empty(), "{ok:?}");
        let with = |key: &str, value: &str| {
            let mut data = kubeadm.clone();
            data.insert(key.to_owned(), value.to_owned());
            data
        };
        let says = |data: &BTreeMap<String, String>, headers: &RequestHeaders, user: &str, proxy: Option<&str>| {
            compare(data, headers, &load(user, proxy, headers))
                .expect_err("it does not fit")
                .to_string()
        };
        let more = with("requestheader-group-headers", r#"["X-Remote-Group","X-Auth-Group"]"#);
        assert!(says(&more, &default, &users, None).contains("X-Auth-Group"));
        let both = RequestHeaders {
            group: vec!["x-remote-group".to_owned(), "x-auth-group".to_owned()],
            ..RequestHeaders::default()
        };
        compare(&more, &both, &load(&users, None, &both)).expect("both are taken from clients");
        let elsewhere = with("requestheader-username-headers", r#"["X-Auth-User"]"#);
        assert!(says(&elsewhere, &default, &users, None).contains("X-Auth-User"));
        let first = RequestHeaders {
            username: vec!["X-Auth-User".to_owned(), "X-Remote-User".to_owned()],
            ..RequestHeaders::default()
        };
        assert!(says(&kubeadm, &first, &users, None).contains("does not read `X-Auth-User`"));
        let wide = format!("{users}{other}");
        assert!(says(&kubeadm, &default, &wide, None).contains("`other`"));
        let ended = format!("{users}{}", authority_until("ended", 2020));
        compare(&kubeadm, &default, &load(&ended, None, &default)).expect("the apiserver leaves out what has expired");
        assert!(says(&kubeadm, &default, &users, Some(&proxies)).contains("--requestheader-allowed-names"));
        let named = RequestHeaders {
            allowed_names: vec!["front-proxy-client".to_owned()],
            ..RequestHeaders::default()
        };
        compare(&kubeadm, &named, &load(&users, Some(&proxies), &named)).expect("the same names");
        assert!(says(&kubeadm, &named, &users, Some(&other)).contains(PROXY_CA));
        let rotated = with("client-ca-file", &wide);
        let ended = with("client-ca-file", &ended);
        let warnings = compare(&ended, &default, &load(&users, None, &default)).expect("as its file has it");
        assert!(warnings.is_empty(), "{warnings:?}");
        let warnings = compare(&rotated, &default, &load(&users, None, &default)).expect("a rotation");
        assert!(warnings[0].contains("`other`"), "{warnings:?}");
        let mut without = kubeadm.clone();
        without.remove("requestheader-client-ca-file");
        assert!(says(&without, &default, &users, None).contains("401"));
    }
}
