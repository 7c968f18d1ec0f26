//! What an apiserver's flags say: on its command line, or in the files that stand in its place.
//!
//! Input: arguments, and a way to read the process's files. Must never take a flag for absent that was not looked for
//! where this kind of process has it.

use std::{collections::BTreeMap, io};

use serde::Deserialize;

/// OpenShift's apiserver takes its flags from this file (`KubeAPIServerConfig`).
const OPENSHIFT: &str = "openshift-config";

/// MicroK8s' kubelite takes the apiserver's from this one, a flag a line.
const KUBELITE: &str = "apiserver-args-file";

/// k3s passes one flag on by each of these.
const K3S: &str = "kube-apiserver-arg";

/// What is said, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The value that counts; `None` when the flag is absent.
    pub value: Option<String>,
    /// Every value that is given: those of a list add up (spf13/pflag, StringSlice).
    pub all: Vec<String>,
    /// Where it would be, in words that follow "is 0".
    pub place: String,
    /// Whether it was found where nothing can hide it: an apiserver that is inside another program shows no flags.
    pub certain: bool,
}

/// What the last flag of a name says: that one counts. The name has hyphens and no dashes before it.
///
/// # Errors
///
/// A file the command line names cannot be read, or is not what it should be; with the file's name.
pub fn said(
    name: &str,
    arguments: &[String],
    read: impl Fn(&str) -> io::Result<String>,
) -> Result<Said, (String, io::Error)> {
    let flags = flags(arguments.iter().map(String::as_str));
    let last = |wanted: &str| {
        flags
            .iter()
            .rfind(|(own, _)| own == wanted)
            .and_then(|(_, value)| *value)
    };
    if let Some(file) = last(OPENSHIFT) {
        let named = |error| (file.to_owned(), error);
        let text = read(file).map_err(named)?;
        let all = openshift(&text, name).map_err(|error| named(io::Error::other(error)))?;
        let place = format!("in {file} (apiServerArguments)");
        return Ok(Said {
            value: all.last().cloned(),
            all,
            place,
            certain: true,
        });
    }
    if let Some(file) = last(KUBELITE) {
        let text = read(file).map_err(|error| (file.to_owned(), error))?;
        let lines: Vec<&str> = text.split_whitespace().collect();
        let given = self::flags(lines.into_iter());
        let (value, all) = of_name(&given, name);
        let place = format!("in {file}");
        return Ok(Said {
            value,
            all,
            place,
            certain: true,
        });
    }
    let passed_on = flags.iter().filter(|(own, _)| own == K3S).filter_map(|(_, value)| {
        let (own, value) = (*value)?.trim_start_matches('-').split_once('=')?;
        (normal(own) == name).then(|| value.to_owned())
    });
    let passed_on: Vec<String> = passed_on.collect();
    if let Some(value) = passed_on.last() {
        let place = format!("on its command line (--{K3S})");
        return Ok(Said {
            value: Some(value.clone()),
            all: passed_on,
            place,
            certain: true,
        });
    }
    let (value, all) = of_name(&flags, name);
    Ok(Said {
        certain: value.is_some(),
        value,
        all,
        place: "on its command line".to_owned(),
    })
}

/// The value of a flag that counts, and all of them; a flag without a value has none, whatever was said before it.
fn of_name(flags: &[(String, Option<&str>)], name: &str) -> (Option<String>, Vec<String>) {
    let given: Vec<Option<&str>> = flags
        .iter()
        .filter(|(own, _)| own == name)
        .map(|(_, value)| *value)
        .collect();
    let value = given.last().copied().flatten().map(str::to_owned);
    (value, given.into_iter().flatten().map(str::to_owned).collect())
}

/// Flags with their values, as spf13/pflag takes them; a flag may be the last argument.
fn flags<'a>(arguments: impl Iterator<Item = &'a str>) -> Vec<(String, Option<&'a str>)> {
    let mut found = Vec::new();
    let mut rest = arguments.peekable();
    while let Some(argument) = rest.next() {
        // What follows is no flag any more.
        if argument == "--" {
            break;
        }
        let Some(flag) = argument.strip_prefix("--") else {
            continue;
        };
        match flag.split_once('=') {
            Some((name, value)) => found.push((normal(name), Some(value))),
            None => found.push((normal(flag), rest.peek().copied())),
        }
    }
    found
}

/// Underscores are taken for hyphens (k8s.io/component-base/cli/flag, WordSepNormalizeFunc).
fn normal(name: &str) -> String {
    name.replace('_', "-")
}

/// The flag in OpenShift's file, YAML or JSON: flags have lists of values.
fn openshift(text: &str, name: &str) -> Result<Vec<String>, serde_yaml_ng::Error> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default, rename = "apiServerArguments")]
        arguments: Option<BTreeMap<String, Vec<String>>>,
    }
    let File { arguments } = serde_yaml_ng::from_str(text)?;
    let given = arguments
        .unwrap_or_default()
        .into_iter()
        .filter(|(own, _)| normal(own) == name);
    Ok(given.flat_map(|(_, values)| values).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANCE: &str = "goaway-chance";

    fn chance(line: &str, file: &str) -> Said {
        let arguments: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let read = |path: &str| {
            assert_eq!(path, "/etc/the/file", "no other file is named");
            Ok(file.to_owned())
        };
        said(CHANCE, &arguments, read).expect("a readable file")
    }

    #[test]
    fn the_last_goaway_chance_counts_however_it_is_written() {
        for (line, chance) in [
            ("kube-apiserver --v=1", None),
            ("kube-apiserver --goaway-chance=0.001", Some("0.001")),
            ("kube-apiserver --goaway_chance=0.001", Some("0.001")),
            ("kube-apiserver --goaway_chance 0.001", Some("0.001")),
            ("kube-apiserver --goaway-chance 0.001 --v=1", Some("0.001")),
            ("kube-apiserver --goaway-chance=0.001 --goaway_chance=0", Some("0")),
            ("kube-apiserver --goaway-chances=0.001", None),
            ("kube-apiserver --goaway-chance", None),
            ("kube-apiserver -- --goaway-chance=0.001", None),
            (
                "k3s server --kube-apiserver-arg=v=2 --kube-apiserver-arg=goaway-chance=0.001",
                Some("0.001"),
            ),
            ("k3s server --kube-apiserver-arg goaway-chance=0.001", Some("0.001")),
            ("k3s server --kube-apiserver-arg --goaway-chance=0.001", Some("0.001")),
        ] {
            let said = self::chance(line, "");
            assert_eq!(said.value.as_deref(), chance, "{line}");
            assert_eq!(said.certain, chance.is_some(), "{line}");
        }
    }

    #[test]
    fn the_values_of_a_list_add_up() {
        let two = ["0.1", "0.2"];
        for (line, file) in [
            ("kube-apiserver --goaway-chance=0.1 --v=1 --goaway_chance 0.2", ""),
            (
                "k3s server --kube-apiserver-arg=goaway-chance=0.1 --kube-apiserver-arg=goaway-chance=0.2",
                "",
            ),
            (
                "kubelite --apiserver-args-file=/etc/the/file",
                "--goaway-chance=0.1\n--goaway-chance=0.2\n",
            ),
            (
                "hyperkube --openshift-config=/etc/the/file",
                "apiServerArguments: {goaway-chance: [\"0.1\", \"0.2\"]}",
            ),
        ] {
            assert_eq!(chance(line, file).all, two, "{line}");
        }
    }

    #[test]
    fn files_stand_in_the_command_lines_place() {
        let openshift = "hyperkube kube-apiserver --openshift-config=/etc/the/file --goaway-chance=0.02";
        for (text, chance) in [
            (
                "apiServerArguments:\n  goaway-chance:\n  - \"0\"\n  - \"0.001\"\n  v: [\"2\"]\n",
                Some("0.001"),
            ),
            (
                r#"{"apiServerArguments": {"goaway-chance": ["0.001"]}, "kind": "KubeAPIServerConfig"}"#,
                Some("0.001"),
            ),
            ("apiServerArguments: null\n", None),
            ("kind: KubeAPIServerConfig\n", None),
        ] {
            let said = self::chance(openshift, text);
            assert_eq!((said.value.as_deref(), said.certain), (chance, true), "{text}");
            assert_eq!(said.place, "in /etc/the/file (apiServerArguments)");
        }
        let kubelite =
            "kubelite --scheduler-args-file=/x --apiserver-args-file=/etc/the/file --start-control-plane=true";
        for (text, chance) in [
            ("--v=1\n--goaway-chance=0.001\n", Some("0.001")),
            ("--goaway_chance 0.001", Some("0.001")),
            ("--v=1\n", None),
        ] {
            let said = self::chance(kubelite, text);
            assert_eq!(
                (said.value.as_deref(), said.place.as_str()),
                (chance, "in /etc/the/file"),
                "{text}"
            );
        }
        let arguments = ["--openshift-config=/x".to_owned()];
        let lost = said(CHANCE, &arguments, |_| Err(io::ErrorKind::NotFound.into()));
        assert_eq!(lost.map_err(|(file, _)| file), Err("/x".to_owned()));
        let odd = said(CHANCE, &arguments, |_| Ok("apiServerArguments: 7".to_owned()));
        assert!(odd.is_err(), "what is not the file it should be says so");
    }
}
