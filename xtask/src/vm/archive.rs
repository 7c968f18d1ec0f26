//! The initramfs: what the guest's first file system holds.
//!
//! Must never need `cpio`: the format is the kernel's own "newc".

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

/// The shared libraries a program of this system needs, its loader included.
pub fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

/// The shared libraries a program for another processor needs, its loader included: those that `find` knows, by name.
pub fn foreign_libraries(
    program: &Path,
    find: impl Fn(&str) -> Option<PathBuf>,
) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    let mut left = vec![program.to_owned()];
    while let Some(file) = left.pop() {
        let output = Command::new("readelf")
            .arg("-dlW")
            .arg(&file)
            .output()
            .context("readelf")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in text.lines() {
            let inside = |before: &str| line.split_once(before)?.1.split(']').next();
            let name = match (inside("(NEEDED)"), inside("interpreter: ")) {
                (Some(needed), _) => needed.rsplit('[').next().unwrap_or_default(),
                (None, Some(loader)) => loader.trim_start_matches('/'),
                (None, None) => continue,
            };
            if found.iter().any(|(known, _)| known == name) {
                continue;
            }
            let base = name.rsplit('/').next().unwrap_or(name);
            let path = find(base).with_context(|| format!("{} needs {name}, which no package has", file.display()))?;
            found.push((name.to_owned(), path.clone()));
            left.push(path);
        }
    }
    Ok(found)
}

/// A cpio archive of the kind the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst, "newc").
pub struct Archive {
    out: BufWriter<File>,
    entries: u32,
}

impl Archive {
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        Ok(Self {
            out: BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?),
            entries: 0,
        })
    }

    pub fn directory(&mut self, name: &str) -> anyhow::Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    pub fn file(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        self.entry(name, 0o100_755, content)
    }

    /// Makes a file's directories, once.
    pub fn parents(&mut self, name: &str, made: &mut Vec<String>) -> anyhow::Result<()> {
        let mut path = String::new();
        let parts: Vec<&str> = name.split('/').collect();
        for part in &parts[..parts.len() - 1] {
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
            if !made.contains(&path) {
                self.directory(&path)?;
                made.push(path.clone());
            }
        }
        Ok(())
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of the initramfs is larger than 4 GiB")?;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(b"\0")?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    /// Fills up to four octets.
    fn pad(&mut self, written: usize) -> anyhow::Result<()> {
        let rest = written.next_multiple_of(4) - written;
        Ok(self.out.write_all(&[0; 3][..rest])?)
    }

    pub fn end(mut self) -> anyhow::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out.flush()?)
    }
}
