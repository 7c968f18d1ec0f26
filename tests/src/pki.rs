//! A cluster's certificates, made anew for each run and held in a directory that goes with it.
//!
//! Output: PEM files by the names kubeadm gives them, and client certificates on demand.

use std::{
    ffi::OsString,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SigningKey as _,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The name every serving certificate has besides its addresses.
pub const SERVER_NAME: &str = "kubernetes.default.svc";

/// The kinds of a name that groups are in, by their OID: rcgen keeps one value for each, so a second organization goes by
/// the number of the first.
const GROUPS: [Option<[u64; 4]>; 2] = [None, Some([2, 5, 4, 10])];

/// The common name of the cluster's authority.
const CLUSTER: &str = "kubernetes";

/// Who may sign.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// The certificates of one cluster.
pub struct Pki {
    directory: tempfile::TempDir,
    addresses: Vec<IpAddr>,
    cluster: Authority,
    front_proxy: Authority,
}

/// Signs clients' certificates, in a process that has no more than the directory of a [`Pki`].
pub struct Signer {
    cluster: Authority,
}

impl Signer {
    /// By the key in that directory.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn read(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join("ca.key");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let key = KeyPair::from_pem(&text).with_context(|| path.display().to_string())?;
        let issuer = Issuer::new(authority_params(CLUSTER), key);
        Ok(Self {
            cluster: Authority { issuer },
        })
    }

    /// Another certificate for whom one (DER) is for, with a new key: both in DER, the key as PKCS #8 (RFC 5208).
    ///
    /// # Errors
    ///
    /// It is no certificate.
    pub fn like(&self, certificate: &[u8]) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
        let (_, read) = X509Certificate::from_der(certificate)?;
        let user = read
            .subject()
            .iter_common_name()
            .next()
            .context("it has no common name")?;
        let groups = read.subject().iter_organization().map(|name| name.as_str());
        let groups = groups.collect::<Result<Vec<_>, _>>()?;
        anyhow::ensure!(
            groups.len() <= GROUPS.len(),
            "it has more groups than can be signed: {groups:?}"
        );
        let mut params = CertificateParams::default();
        name(&mut params, user.as_str()?, &groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.cluster.issuer)?;
        Ok((certificate.der().to_vec(), key.serialize_der()))
    }
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The certificate (PEM).
    pub certificate: PathBuf,
    /// The key (PEM).
    pub key: PathBuf,
}

impl Pki {
    /// What a relay before an apiserver of this authority is told of names, certificates and keys.
    pub fn relay_flags(&self) -> Vec<OsString> {
        let mut flags = vec![format!("--upstream-server-name={SERVER_NAME}").into()];
        for (flag, file) in [
            ("--upstream-ca", "ca.crt"),
            ("--tls-cert", "apiserver.crt"),
            ("--tls-key", "apiserver.key"),
            ("--client-ca", "ca.crt"),
            ("--proxy-client-cert", "front-proxy-client.crt"),
            ("--proxy-client-key", "front-proxy-client.key"),
        ] {
            flags.extend([flag.into(), self.file(file).into_os_string()]);
        }
        flags
    }

    /// The same without one of the flags.
    pub fn relay_flags_without(&self, flag: &str) -> Vec<OsString> {
        let mut flags = self.relay_flags();
        if let Some(at) = flags.iter().position(|one| one == flag) {
            flags.drain(at..at + 2);
        }
        flags
    }

    /// Makes both authorities, a serving certificate for `addresses`, the front-proxy client, an administrator and the
    /// key of service account tokens.
    ///
    /// # Errors
    ///
    /// The directory cannot be written.
    pub fn new(addresses: &[IpAddr]) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("rebalancer-pki-").tempdir()?;
        let cluster = authority(directory.path(), "ca", CLUSTER)?;
        let front_proxy = authority(directory.path(), "front-proxy-ca", "front-proxy-ca")?;
        let pki = Self {
            directory,
            addresses: addresses.to_vec(),
            cluster,
            front_proxy,
        };
        pki.renew()?;
        pki.client("admin", "admin", &["system:masters"])?;
        let tokens = KeyPair::generate()?;
        fs::write(pki.file("sa.key"), tokens.serialize_pem())?;
        fs::write(pki.file("sa.pub"), tokens.public_key_pem())?;
        Ok(pki)
    }

    /// Signs the serving certificate and the front-proxy client's, with new keys, in the files of the last ones: as
    /// `kubeadm certs renew` does, certificate and key do not change at one moment.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn renew(&self) -> anyhow::Result<()> {
        let mut serving = CertificateParams::new(vec![SERVER_NAME.into(), "kubernetes".into(), "localhost".into()])?;
        serving
            .subject_alt_names
            .extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        name(&mut serving, "kube-apiserver", &[]);
        serving.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        sign(&self.cluster, serving, self.path(), "apiserver")?;
        let mut proxy = CertificateParams::default();
        name(&mut proxy, "front-proxy-client", &[]);
        proxy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        sign(&self.front_proxy, proxy, self.path(), "front-proxy-client")
    }

    /// Adds an authority to the bundle that clients and relays are judged by, as before an authority is replaced.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn add_authority(&self) -> anyhow::Result<()> {
        authority(self.path(), "next-ca", "kubernetes-next")?;
        let both = [fs::read(self.file("ca.crt"))?, fs::read(self.file("next-ca.crt"))?].concat();
        // Renamed into its place: half a bundle would be another fault.
        let next = self.file("ca.crt.next");
        fs::write(&next, both)?;
        fs::rename(next, self.file("ca.crt")).context("the bundle cannot be replaced")
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// One of the files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// A certificate and its key by their common stem.
    pub fn pair(&self, stem: &str) -> Pair {
        Pair {
            certificate: self.file(&format!("{stem}.crt")),
            key: self.file(&format!("{stem}.key")),
        }
    }

    /// A client certificate of the cluster's authority, in files of that stem.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn client(&self, stem: &str, user: &str, groups: &[&str]) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::default();
        name(&mut params, user, groups);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        sign(&self.cluster, params, self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A client certificate of the cluster's authority, changed before it is signed.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn client_with(&self, stem: &str, change: impl FnOnce(&mut CertificateParams)) -> anyhow::Result<Pair> {
        sign(&self.cluster, changed(stem, change), self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A client certificate of an authority that nobody trusts.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn stranger(&self, stem: &str, change: impl FnOnce(&mut CertificateParams)) -> anyhow::Result<Pair> {
        let stranger = authority(self.path(), &format!("{stem}-ca"), "somebody-else")?;
        sign(&stranger, changed(stem, change), self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A client certificate of an authority that has expired, whose own certificate is `STEM-ca.crt`.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn of_expired_authority(&self, stem: &str, groups: &[&str]) -> anyhow::Result<Pair> {
        let mut params = authority_params(&format!("expired-{stem}"));
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let expired = authority_of(self.path(), &format!("{stem}-ca"), params)?;
        let mut client = changed(stem, |_| ());
        name(&mut client, stem, groups);
        sign(&expired, client, self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A certificate of the front proxies' authority, in files of that stem.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn proxy(&self, stem: &str) -> anyhow::Result<Pair> {
        sign(&self.front_proxy, changed(stem, |_| ()), self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A certificate of the front proxies' authority for the name that the apiserver believes, valid until then, in files
    /// of that stem.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn front_proxy_until(&self, stem: &str, until: SystemTime) -> anyhow::Result<Pair> {
        let mut params = changed("front-proxy-client", |_| ());
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + until.duration_since(UNIX_EPOCH)?;
        sign(&self.front_proxy, params, self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A client certificate of the cluster's authority as `openssl x509 -req` without extensions makes it: version 1.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn client_v1(&self, stem: &str, group: &str) -> anyhow::Result<Pair> {
        let element = |tag: u8, parts: &[&[u8]]| {
            let content = parts.concat();
            let length = content.len().to_be_bytes();
            let mut out = vec![tag];
            match content.len() {
                0..128 => out.push(length[7]),
                128..256 => out.extend([0x81, length[7]]),
                _ => out.extend([0x82, length[6], length[7]]),
            }
            out.extend(content);
            out
        };
        // ecdsa-with-SHA256 (RFC 5758, section 3.2).
        const ALGORITHM: &[u8] = &[0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
        let key = KeyPair::generate()?;
        // What rcgen makes is of version 3: of it the names and the key are taken.
        let mut params = CertificateParams::default();
        name(&mut params, stem, &[group]);
        let made = params.signed_by(&key, &self.cluster.issuer)?;
        let (_, parsed) = X509Certificate::from_der(made.der())?;
        let parts = &parsed.tbs_certificate;
        let validity = [
            &element(0x17, &[b"200101000000Z"])[..],
            &element(0x17, &[b"491231235959Z"]),
        ]
        .concat();
        let signed = element(
            0x30,
            &[
                &[2, 1, 1],
                ALGORITHM,
                parts.issuer.as_raw(),
                &element(0x30, &[&validity]),
                parts.subject.as_raw(),
                parts.subject_pki.raw,
            ],
        );
        let signature = self.cluster.issuer.key().sign(&signed)?;
        let der = element(0x30, &[&signed, ALGORITHM, &element(3, &[&[0], &signature])]);
        let text = to_pem(&der);
        write(self.path(), stem, &text, &key)?;
        Ok(self.pair(stem))
    }

    /// A serving certificate of the cluster's authority for those names, in files of that stem, which are replaced.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn serving(&self, stem: &str, names: &[&str]) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        name(&mut params, stem, &[]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        sign(&self.cluster, params, self.path(), stem)?;
        Ok(self.pair(stem))
    }

    /// A certificate of the cluster's authority for both ends of the agents' talk, valid for one address.
    ///
    /// # Errors
    ///
    /// The files cannot be written.
    pub fn peer(&self, stem: &str, address: IpAddr) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::IpAddress(address));
        name(&mut params, stem, &[]);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        sign(&self.cluster, params, self.path(), stem)?;
        Ok(self.pair(stem))
    }
}

fn changed(user: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    name(&mut params, user, &[]);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    params
}

fn name(params: &mut CertificateParams, user: &str, groups: &[&str]) {
    params.distinguished_name = DistinguishedName::new();
    assert!(groups.len() <= GROUPS.len(), "two groups at most: {groups:?}");
    for (kind, group) in GROUPS.into_iter().zip(groups) {
        let kind = match kind {
            None => DnType::OrganizationName,
            Some(oid) => DnType::CustomDnType(oid.to_vec()),
        };
        params.distinguished_name.push(kind, *group);
    }
    params.distinguished_name.push(DnType::CommonName, user);
}

fn authority(directory: &Path, stem: &str, common_name: &str) -> anyhow::Result<Authority> {
    authority_of(directory, stem, authority_params(common_name))
}

fn authority_params(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    name(&mut params, common_name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn authority_of(directory: &Path, stem: &str, params: CertificateParams) -> anyhow::Result<Authority> {
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    write(directory, stem, &certificate.pem(), &key)?;
    Ok(Authority {
        issuer: Issuer::new(params, key),
    })
}

fn sign(authority: &Authority, params: CertificateParams, directory: &Path, stem: &str) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &authority.issuer)?;
    write(directory, stem, &certificate.pem(), &key)
}

fn to_pem(der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = der.chunks(3).flat_map(|chunk| {
        let octet = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = octet(0) << 16 | octet(1) << 8 | octet(2);
        let digit = move |at: usize| {
            if at <= chunk.len() {
                char::from(ALPHABET[(bits >> (18 - 6 * at)) as usize & 63])
            } else {
                '='
            }
        };
        (0..4).map(digit)
    });
    let digits: Vec<char> = digits.collect();
    let lines: Vec<String> = digits.chunks(64).map(|line| line.iter().collect()).collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
}

fn write(directory: &Path, stem: &str, certificate: &str, key: &KeyPair) -> anyhow::Result<()> {
    for (ending, text) in [("crt", certificate), ("key", &key.serialize_pem())] {
        let path = directory.join(format!("{stem}.{ending}"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
