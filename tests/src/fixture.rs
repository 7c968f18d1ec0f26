//! A real kube-apiserver, etcd and the client-go swarm: named, found, or built once from their Go modules.
//!
//! Output: paths of binaries. Must never build into the work tree: the cache outlives it.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};

/// The release the module in `tests/go` builds.
pub const VERSION: &str = "v1.36.2";

/// The binaries.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// kube-apiserver.
    pub apiserver: PathBuf,
    /// etcd.
    pub etcd: PathBuf,
    /// The client-go swarm.
    pub swarm: PathBuf,
}

/// Name the swarm and the light kubelets where a VM carries them.
const SWARM: &str = "REBALANCER_SWARM";
const KUBELETS: &str = "REBALANCER_KUBELETS";

/// Where the Go module is.
fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("go")
}

/// Where what was built for this machine is.
fn cache() -> anyhow::Result<PathBuf> {
    cache_of("")
}

fn cache_of(suffix: &str) -> anyhow::Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: no place for the built binaries")?;
    Ok(base.join("rebalancer").join(format!("apiserver-{VERSION}{suffix}")))
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

fn named(variable: &str, program: &str) -> Option<PathBuf> {
    env::var_os(variable).map(PathBuf::from).or_else(|| on_path(program))
}

impl Fixture {
    /// What is at hand without building anything: `KUBE_APISERVER` and `ETCD`, else PATH, else built before.
    pub fn at_hand() -> Option<Self> {
        let cache = cache().ok()?;
        let built = |program: &str| Some(cache.join(program)).filter(|path| path.is_file());
        Some(Self {
            apiserver: named("KUBE_APISERVER", "kube-apiserver").or_else(|| built("kube-apiserver"))?,
            etcd: named("ETCD", "etcd").or_else(|| built("etcd"))?,
            swarm: env::var_os(SWARM)
                .map(PathBuf::from)
                .filter(|path| path.is_file())
                .or_else(|| built("swarm"))?,
        })
    }

    /// Whether the swarm that was built is as old as its source.
    fn is_stale(cache: &Path, program: &str) -> bool {
        let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        let Some(built) = time(&cache.join(program)) else {
            return true;
        };
        let sources = fs::read_dir(module().join("cmd").join(program))
            .into_iter()
            .flatten()
            .flatten();
        let ours = program == "swarm";
        ours && sources
            .filter_map(|entry| time(&entry.path()))
            .any(|changed| changed > built)
    }

    /// What is at hand, and the rest built; `say` hears each step before it begins.
    ///
    /// # Errors
    ///
    /// No Go, or the build fails.
    pub fn get(say: impl Fn(&str)) -> anyhow::Result<Self> {
        let cache = cache()?;
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let get = |variable: Option<&str>, program: &str| -> anyhow::Result<PathBuf> {
            if let Some(found) = variable.and_then(|variable| named(variable, program)) {
                return Ok(found);
            }
            let path = cache.join(program);
            if Self::is_stale(&cache, program) {
                build(program, None, &path, &say)?;
            }
            Ok(path)
        };
        Ok(Self {
            etcd: get(Some("ETCD"), "etcd")?,
            swarm: match env::var_os(SWARM) {
                Some(carried) => carried.into(),
                None => get(None, "swarm")?,
            },
            apiserver: get(Some("KUBE_APISERVER"), "kube-apiserver")?,
        })
    }
}

/// Builds kube-apiserver and etcd for another processor, of Go's name for it, where they are not built; a VM carries them.
/// `say` hears each step before it begins.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn control_plane_for(processor: &str, say: impl Fn(&str)) -> anyhow::Result<()> {
    let cache = cache_of(&format!("-{processor}"))?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    for program in ["etcd", "kube-apiserver"] {
        let path = cache.join(program);
        if !path.is_file() {
            build(program, Some(processor), &path, &say)?;
        }
    }
    Ok(())
}

/// The small server on the apiserver's own goaway filter: named, or where a VM carries it.
///
/// # Errors
///
/// There is none.
pub fn goaway_server() -> anyhow::Result<PathBuf> {
    let server = env::var_os("REBALANCER_GOAWAY_SERVER").map_or_else(|| "/bin/goaway-server".into(), PathBuf::from);
    if server.is_file() {
        Ok(server)
    } else {
        bail!("there is no goaway-server: it is built by `cargo xtask`, where Go 1.26 or later is on PATH")
    }
}

/// What answers for a node's kubelet (tests/go/kubelet), built whenever its source has changed.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn kubelet() -> anyhow::Result<PathBuf> {
    small("kubelet", &module().join("kubelet"), ".")
}

/// Go's own HTTP/2 server with objects, watches and large bodies (tests/go/cmd/backend), built whenever its source has
/// changed.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn backend() -> anyhow::Result<PathBuf> {
    small("backend", &module(), "./cmd/backend")
}

/// Builds a program of tests/go into the cache: Go itself knows whether there is anything to do.
fn small(program: &str, directory: &Path, package: &str) -> anyhow::Result<PathBuf> {
    let to = cache()?.join(program);
    go_build(package, directory, None, STRIPPED, &to)?;
    Ok(to)
}

/// The light kubelets (tests/go/cmd/kubelets), built whenever their source has changed.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn kubelets() -> anyhow::Result<PathBuf> {
    if let Some(carried) = env::var_os(KUBELETS) {
        return Ok(carried.into());
    }
    small("kubelets", &module(), "./cmd/kubelets")
}

/// Hollow kubelets of k8s.io/kubernetes/pkg/kubemark (tests/go/node/hollow), built whenever their source has changed. `say`
/// hears that it may take minutes.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn hollow(say: impl Fn(&str)) -> anyhow::Result<PathBuf> {
    say("building hollow kubelets from their Go modules; the first time takes about 10 minutes on 2 cores");
    small("hollow", &module().join("node"), "./hollow")
}

/// Whether there is Go to build anything with.
pub fn has_go() -> bool {
    on_path("go").is_some()
}

/// What looks at manifests, built from tests/go/tools: `chart`, which renders a Helm chart with Helm's own packages, and
/// kubeconform. Most of what they need was compiled for kube-apiserver.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn tool(program: &str) -> anyhow::Result<PathBuf> {
    let package = match program {
        "chart" => "./chart",
        "kubeconform" => "github.com/yannh/kubeconform/cmd/kubeconform",
        _ => bail!("tests/go/tools has no {program}"),
    };
    small(program, &module().join("tools"), package)
}

/// The programs of a kubeadm node beside kube-apiserver and etcd, built once from tests/go/node: a directory with
/// kubeadm, kubelet, kubectl, kube-controller-manager, kube-scheduler and pause. `say` hears each step before it begins.
///
/// # Errors
///
/// No Go, or the build fails.
pub fn node_programs(say: impl Fn(&str)) -> anyhow::Result<PathBuf> {
    let cache = cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let directory = cache.join("node");
    fs::create_dir_all(&directory)?;
    for (program, package) in [
        ("pause", "./pause"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ("kubeadm", "k8s.io/kubernetes/cmd/kubeadm"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        (
            "kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
        ),
    ] {
        let to = directory.join(program);
        if !to.is_file() {
            say(&format!(
                "building {program} {VERSION} from its Go modules, once; all of them take about 15 minutes on 2 cores"
            ));
            build_package(package, &module().join("node"), None, &to)?;
        }
    }
    Ok(directory)
}

/// What kube-apiserver says of its own objects (OpenAPI), from its Go module.
///
/// # Errors
///
/// No Go, or the module cannot be fetched.
pub fn openapi() -> anyhow::Result<serde_json::Value> {
    let Some(go) = on_path("go") else {
        bail!("there is no `go` on PATH to fetch kube-apiserver's module with: install Go 1.26 or later");
    };
    let output = Command::new(go)
        .current_dir(module())
        .args(["mod", "download", "-json", &format!("k8s.io/kubernetes@{VERSION}")])
        .output()
        .context("cannot start go")?;
    let said: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("`go mod download` said something that is no JSON")?;
    let directory = said["Dir"]
        .as_str()
        .with_context(|| format!("`go mod download` fetched nothing: {said}"))?;
    let path = Path::new(directory).join("api/openapi-spec/swagger.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))
}

fn build(program: &str, processor: Option<&str>, to: &Path, say: impl Fn(&str)) -> anyhow::Result<()> {
    if on_path("go").is_none() {
        bail!(
            "there is no `go` on PATH to build {program} {VERSION} with: install Go 1.26 or later, \
             or name binaries by KUBE_APISERVER and ETCD"
        );
    }
    let of = processor
        .map(|processor| format!(" for {processor}"))
        .unwrap_or_default();
    say(&format!(
        "building {program} {VERSION}{of} from its Go modules, once; kube-apiserver takes 5 to 10 minutes on 2 cores"
    ));
    build_package(&format!("./cmd/{program}"), &module(), processor, to)
}

/// Builds a program that says it is of the release: kubeadm compares versions. Without a processor it is for this one.
fn build_package(package: &str, directory: &Path, processor: Option<&str>, to: &Path) -> anyhow::Result<()> {
    let partial = to.with_extension(format!("partial-{}", std::process::id()));
    let mut parts = VERSION.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let set = |name: &str, value: &str| format!("-X k8s.io/component-base/version.{name}={value}");
    let flags = [
        STRIPPED.to_owned(),
        set("gitVersion", VERSION),
        set("gitMajor", major),
        set("gitMinor", minor),
    ];
    go_build(package, directory, processor, &flags.join(" "), &partial)?;
    fs::rename(&partial, to).with_context(|| format!("cannot move the binary to {}", to.display()))
}

/// Without symbols and debug information.
const STRIPPED: &str = "-s -w";

/// How often Go is asked to build before it is believed that it cannot.
const TRIES: u64 = 3;

/// Builds a Go package to that path, with those flags for its linker. Without a processor it is for this one. What Go
/// fetches may be out of reach for a moment, so it is asked more than once; a program that does not compile is refused
/// as soon each time.
fn go_build(
    package: &str,
    directory: &Path,
    processor: Option<&str>,
    linker_flags: &str,
    to: &Path,
) -> anyhow::Result<()> {
    let Some(go) = on_path("go") else {
        bail!("there is no `go` on PATH to build {package} with: install Go 1.26 or later");
    };
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    // Each test of a run asks anew: what could not be built a moment ago is tried once.
    static FAILED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let failed = || FAILED.lock().unwrap_or_else(PoisonError::into_inner);
    let most = if failed().contains(to) { 1 } else { TRIES };
    let mut tries = 0;
    loop {
        let mut command = Command::new(&go);
        if let Some(processor) = processor {
            command.env("GOARCH", processor);
        }
        // What is there and as new costs Go a second.
        let status = command
            .current_dir(directory)
            .env("CGO_ENABLED", "0")
            .args(["build", "-trimpath", "-ldflags", linker_flags, "-o"])
            .arg(to)
            .arg(package)
            .status()
            .context("cannot start go")?;
        tries += 1;
        if status.success() {
            return Ok(());
        }
        if tries == most {
            failed().insert(to.to_owned());
            bail!("`go build` of {package} in {} failed ({status})", directory.display());
        }
        thread::sleep(Duration::from_secs(10 * tries));
    }
}
