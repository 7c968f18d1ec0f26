//! Where the program that reads ClientHellos is attached: at the apiserver's own cgroup, or at the root of all.
//!
//! Input: the cgroups of the sockets that listen on the watched port. Output: links, or why nothing is seen.
//! Must never take the root that a cgroup namespace shows for the host's: its program would see nobody's packets.
//!
//! The kernel runs the programs of the cgroup a socket was made in, and an accepted socket is of its listener's. While
//! nobody listens the program is at the root, so that the next apiserver's first clients are seen, wherever it comes up.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

/// The root of the whole hierarchy has this inode number, whoever looks (kernel/cgroup/cgroup.c: the first id that is
/// given out).
const ROOT: u64 = 1;

/// include/uapi/linux/magic.h
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// include/uapi/linux/bpf.h
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_CGROUP_INET_INGRESS: u32 = 0;

/// include/linux/exportfs.h: a handle that is a kernfs node's id.
const FILEID_KERNFS: i32 = 0xfe;

/// A walk through more cgroups than that ends at the root.
const CGROUPS: usize = 100_000;

/// A cgroup2 filesystem.
#[derive(Debug)]
struct Hierarchy {
    path: PathBuf,
    directory: File,
    /// Whether its root is the root of all, and not one of a cgroup namespace.
    is_whole: bool,
}

/// The program's attachments.
#[derive(Debug)]
pub struct Hook {
    hierarchy: Result<Hierarchy, String>,
    /// By the cgroup's id; a link goes with its descriptor.
    links: BTreeMap<u64, OwnedFd>,
}

impl Hook {
    /// Finds the hierarchy: at `root` when one is named, else where this process, or the first one, has it mounted.
    pub fn find(root: Option<&Path>) -> Self {
        let hierarchy = match root {
            Some(path) => {
                Hierarchy::open(path.to_owned()).map_err(|error| format!("--cgroup-root {}: {error}", path.display()))
            }
            None => Hierarchy::find(),
        };
        Self {
            hierarchy,
            links: BTreeMap::new(),
        }
    }

    /// Attaches the program where sockets that listen are, by their cgroups' ids, or at the root when nobody listens or
    /// these cannot be found: where it is now, or why it is nowhere.
    pub fn follow(&mut self, program: BorrowedFd<'_>, listeners: &BTreeSet<u64>) -> Result<String, String> {
        let hierarchy = self.hierarchy.as_ref().map_err(Clone::clone)?;
        let mut wanted: BTreeMap<u64, File> = BTreeMap::new();
        for id in listeners {
            match hierarchy.cgroup(*id) {
                Some(directory) => drop(wanted.insert(*id, directory)),
                None => {
                    wanted.clear();
                    break;
                }
            }
        }
        if wanted.is_empty() {
            let root = hierarchy.cgroup(ROOT).ok_or_else(|| hierarchy.too_small())?;
            wanted.insert(ROOT, root);
        }
        // The new ones first: nothing is missed in between.
        for (id, directory) in &wanted {
            if !self.links.contains_key(id) {
                let link = link(program, directory.as_fd())
                    .map_err(|error| format!("the kernel does not attach the program to a cgroup: {error}"))?;
                self.links.insert(*id, link);
            }
        }
        self.links.retain(|id, _| wanted.contains_key(id));
        Ok(match wanted.keys().copied().collect::<Vec<_>>()[..] {
            [ROOT] => "the root of all cgroups".to_owned(),
            _ => format!(
                "the apiserver's own cgroup, {}",
                wanted.values().map(path_of).collect::<Vec<_>>().join(" and ")
            ),
        })
    }
}

impl Hierarchy {
    fn find() -> Result<Self, String> {
        let mut partial = None;
        let mut seen = 0;
        // The first process is the host's where the process ids are the host's, as with `hostPID`.
        for (mounts, prefix) in [("/proc/self/mounts", "/"), ("/proc/1/mounts", "/proc/1/root")] {
            let Ok(text) = fs::read(mounts) else { continue };
            for path in cgroup2(&text) {
                seen += 1;
                let path = Path::new(prefix).join(path.strip_prefix("/").unwrap_or(&path));
                match Self::open(path) {
                    Ok(found) if found.is_whole => return Ok(found),
                    Ok(found) => drop(partial.get_or_insert(found)),
                    Err(_) => {}
                }
            }
        }
        partial.ok_or_else(|| {
            if seen == 0 {
                "no cgroup2 filesystem is mounted, which is where ClientHellos are read".to_owned()
            } else {
                "none of the cgroup2 filesystems that are mounted can be opened".to_owned()
            }
        })
    }

    fn open(path: PathBuf) -> io::Result<Self> {
        let directory = File::open(&path)?;
        // SAFETY: `statfs` is integers only, of which all zeros are a value.
        let mut kind: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and the pointer is to a value that lives through the call.
        if unsafe { libc::fstatfs(directory.as_raw_fd(), &raw mut kind) } != 0 {
            return Err(io::Error::last_os_error());
        }
        #[allow(
            clippy::unnecessary_cast,
            clippy::allow_attributes,
            reason = "its width differs between architectures"
        )]
        if kind.f_type as i64 != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::other("it is not on a cgroup2 filesystem"));
        }
        let is_whole = directory.metadata()?.ino() == ROOT;
        Ok(Self {
            path,
            directory,
            is_whole,
        })
    }

    /// A cgroup by its id; `None` where it cannot be reached.
    fn cgroup(&self, id: u64) -> Option<File> {
        if self.is_whole && id == ROOT {
            return self.directory.try_clone().ok();
        }
        by_handle(&self.directory, id).ok().or_else(|| {
            let mut left = CGROUPS;
            walk(&self.path, id, &mut left)
        })
    }

    fn too_small(&self) -> String {
        format!(
            "{} shows only this container's own cgroups, for it has a cgroup namespace of its own: give the agent \
             CAP_DAC_READ_SEARCH, or run it with the host's process ids, or mount the host's /sys/fs/cgroup and name it \
             by --cgroup-root",
            self.path.display()
        )
    }
}

/// The mount points of cgroup2 in a list of mounts (proc_pid_mounts(5)).
fn cgroup2(mounts: &[u8]) -> impl Iterator<Item = PathBuf> {
    mounts.split(|octet| *octet == b'\n').filter_map(|line| {
        let mut words = line.split(|octet| *octet == b' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == b"cgroup2").then(|| PathBuf::from(OsString::from_vec(unescaped(path))))
    })
}

/// Blanks and backslashes are in octal there (getmntent(3)).
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .first_chunk::<3>()
            .filter(|digits| *first == b'\\' && digits.iter().all(|digit| matches!(digit, b'0'..=b'7')));
        match octal {
            Some(digits) => {
                out.push(
                    digits
                        .iter()
                        .fold(0_u8, |sum, digit| sum.wrapping_mul(8).wrapping_add(digit - b'0')),
                );
                rest = &after[3..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// Opens a cgroup by its id, wherever it is: also above what a cgroup namespace shows. It takes CAP_DAC_READ_SEARCH.
fn by_handle(mount: &File, id: u64) -> io::Result<File> {
    #[repr(C)]
    struct Handle {
        octets: u32,
        kind: i32,
        id: [u32; 2],
    }
    let halves = id.to_ne_bytes();
    let half = |at: usize| u32::from_ne_bytes([halves[at], halves[at + 1], halves[at + 2], halves[at + 3]]);
    let mut handle = Handle {
        octets: 8,
        kind: FILEID_KERNFS,
        id: [half(0), half(4)],
    };
    // SAFETY: the handle has the head of `struct file_handle` and as many octets behind it as it says; it and the
    // descriptor live through the call.
    let descriptor = unsafe {
        libc::open_by_handle_at(
            mount.as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

fn walk(directory: &Path, id: u64, left: &mut usize) -> Option<File> {
    *left = left.checked_sub(1)?;
    if fs::metadata(directory).ok()?.ino() == id {
        return File::open(directory).ok();
    }
    let entries = fs::read_dir(directory).ok()?.flatten();
    let mut below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.find_map(|entry| walk(&entry.path(), id, left))
}

/// Attaches a program by a link: it goes with its descriptor, however this process ends.
///
/// There is no other way here. aya asks the kernel's version whether there are links and else attaches for good, and
/// exclusively; a kernel that has ring buffers has links.
fn link(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = [
        program.as_raw_fd() as u32,
        cgroup.as_raw_fd() as u32,
        BPF_CGROUP_INET_INGRESS,
        // Flags: none, which is what links take; they never exclude each other.
        0,
    ];
    // SAFETY: the pointer is to the sixteen octets that this command takes, which live through the call, as the two
    // descriptors do.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            attributes.as_ptr(),
            size_of_val(&attributes) as libc::c_long,
        )
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) })
}

fn path_of(directory: &File) -> String {
    let path = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    path.map_or_else(|_| "of unknown path".to_owned(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_as_they_are_written() {
        let text = b"cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\nx /mnt/a\\040b\\134c cgroup2 rw 0 0\n\nshort\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let found: Vec<PathBuf> = cgroup2(text).collect();
        assert_eq!(found, [Path::new("/mnt/a b\\c"), Path::new("/sys/fs/cgroup/unified")]);
        assert_eq!(unescaped(b"a\\04"), b"a\\04");
        assert_eq!(unescaped(b"\\377\\\\"), b"\xff\\\\");
    }

    #[test]
    fn what_is_not_cgroup2_is_refused_by_name() {
        let mut hook = Hook::find(Some(Path::new("/proc")));
        let file = File::open("/proc/self/status").expect("a file");
        let said = hook.follow(file.as_fd(), &BTreeSet::new()).expect_err("not cgroup2");
        assert!(
            said.contains("--cgroup-root /proc") && said.contains("cgroup2"),
            "{said}"
        );
    }
}
