//! Whether relay and apiserver believe each other: files and flags of both, side by side.
//!
//! Input: what the relay is told, what the apiserver is told with the files that are named there, what it shows.
//! Must never say what is in a key: only whether it fits.

use std::collections::BTreeMap;

use super::{Finding, Gravity};
use crate::relay::{Files, RequestHeaders, believes, compare_files};

/// What a relay is told of whom it believes.
#[derive(Clone, Debug)]
pub struct Told {
    /// Certificates and keys.
    pub files: Files,
    /// The headers that name users.
    pub headers: RequestHeaders,
}

/// What is known of the apiserver.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its flags by the names they have in ConfigMap kube-system/extension-apiserver-authentication, files as their text;
    /// or why they are not known.
    pub flags: Result<BTreeMap<String, String>, String>,
    /// The certificate that it shows (DER), or why it shows none.
    pub shown: Result<Vec<u8>, String>,
}

/// Judges both.
pub fn trust(relay: &Told, apiserver: &Known) -> Vec<Finding> {
    let mut findings = vec![match relay.files.check(&relay.headers) {
        Ok(()) => Finding::good("relay's files", "they can be read, and belong together"),
        Err(error) => Finding::mend(
            "relay's files",
            Gravity::Wrong,
            format!("{error:#}"),
            "no relay starts so; one that runs goes on with what it read before, until it is restarted",
        ),
    }];
    let not_known = |what: &str, why: &String| Finding::note(what, format!("not compared: {why}"));
    let what = "serving certificate";
    findings.push(match (relay.files.shown(), &apiserver.shown) {
        // Said by the files.
        (Err(_), _) => Finding::note(what, "not compared: it cannot be read"),
        (_, Err(why)) => not_known(what, why),
        (Ok(ours), Ok(theirs)) if ours.as_ref() == theirs => Finding::good(what, "the apiserver's own"),
        (Ok(_), Ok(_)) => Finding::mend(
            what,
            Gravity::Soon,
            "the relay's --tls-cert is not the certificate that the apiserver shows",
            "give the relay the apiserver's --tls-cert-file and --tls-private-key-file; if it was just renewed, the \
             apiserver reads it again within a minute",
        ),
    });
    let flags = match &apiserver.flags {
        Ok(flags) => flags,
        Err(why) => {
            findings.extend(["relay's flags", "front-proxy certificate"].map(|what| not_known(what, why)));
            return findings;
        }
    };
    let what = "relay's flags";
    match compare_files(flags, &relay.headers, &relay.files) {
        Ok(warnings) if warnings.is_empty() => findings.push(Finding::good(what, "they are the apiserver's")),
        Ok(warnings) => findings.extend(
            warnings
                .into_iter()
                .map(|warning| Finding::mend(what, Gravity::Soon, warning, "give the relay the apiserver's own file")),
        ),
        Err(error) => findings.push(Finding::mend(
            what,
            Gravity::Wrong,
            format!("{error:#}"),
            "give the relay the apiserver's own values: it refuses to start with others",
        )),
    }
    let what = "front-proxy certificate";
    findings.push(match believes(flags, &relay.files.proxy_certificate) {
        Ok(()) => Finding::good(what, "the apiserver believes it"),
        Err(error) => Finding::mend(
            what,
            Gravity::Wrong,
            format!("the apiserver does not believe it: {error:#}"),
            "every client with a certificate is answered 401 by way of the relay: give --proxy-client-cert one that is \
             signed by the apiserver's --requestheader-client-ca-file, for a name it allows",
        ),
    });
    findings
}
