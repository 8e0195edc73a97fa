//! The house stays in order: crate edges, where `unsafe` and clocks may be, how long files get.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a source file, without its tests.
const MAX_LINES: usize = 450;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Every Rust file under `directory`, with its text up to its tests.
fn sources(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file");
            let code = text.split("\n#[cfg(test)]").next().unwrap_or("").to_owned();
            found.push((path, code));
        }
    }
    assert!(!found.is_empty(), "no sources under {}", directory.display());
    found
}

fn crate_sources() -> Vec<(PathBuf, String)> {
    ["common", "proto", "coordinator", "worker", "cli"]
        .iter()
        .flat_map(|name| sources(&root().join(name).join("src")))
        .collect()
}

/// The names in a manifest's `[dependencies]`.
fn dependencies(name: &str) -> Vec<String> {
    let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
    let section = manifest.split("[dependencies]").nth(1).expect("dependencies");
    let lines = section.lines().take_while(|line| !line.starts_with('['));
    let name = |line: &str| line.split(['.', ' ', '=']).next().unwrap_or("").to_owned();
    lines.map(name).filter(|name| !name.is_empty()).collect()
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    let edges = |name: &str| -> Vec<String> {
        let all = dependencies(name).into_iter();
        all.filter_map(|name| name.strip_prefix("lockstep-").map(str::to_owned)).collect()
    };
    assert!(edges("common").is_empty());
    assert_eq!(edges("proto"), ["common"]);
    assert_eq!(edges("coordinator"), ["common", "proto"]);
    assert_eq!(edges("worker"), ["common", "proto"]);
    let foreign = ["tokio", "tonic", "prost"];
    let common = dependencies("common");
    assert!(foreign.iter().all(|name| !common.contains(&(*name).to_owned())), "common is pure: {common:?}");
}

#[test]
fn unsafe_code_lives_under_the_kernels_and_in_shared_memory_only() {
    let shared_memory = root().join("common/src/shared_memory");
    let kernel = root().join("common/src/kernel");
    let is_unsafe = |line: &str| {
        let line = line.trim_start();
        !line.starts_with("//") && ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| line.contains(word))
    };
    for (path, code) in crate_sources() {
        let found = code.lines().any(is_unsafe);
        assert!(
            !found || path.starts_with(&kernel) || path.starts_with(&shared_memory),
            "{} has unsafe code",
            path.display()
        );
    }
}

#[test]
fn pure_code_knows_no_clock_and_no_async() {
    let pure = [root().join("common/src"), root().join("coordinator/src/round")];
    for (path, code) in crate_sources() {
        if pure.iter().any(|directory| path.starts_with(directory)) {
            for word in ["Instant", "SystemTime", "tokio::", "async fn", "std::thread", "static mut"] {
                assert!(!code.contains(word), "{} mentions {word}", path.display());
            }
        }
    }
}

#[test]
fn generated_types_stay_out_of_states() {
    for (path, code) in crate_sources() {
        let wire = code.contains("lockstep_proto::v1") || code.contains(" v1::");
        let may = path.starts_with(root().join("proto"))
            || path.starts_with(root().join("coordinator/src/grpc"))
            || path.ends_with("worker/src/client.rs")
            || path.ends_with("worker/src/sharing.rs")
            || path.ends_with("cli/src/control.rs")
            || path.ends_with("cli/src/monitor.rs");
        assert!(!wire || may, "{} uses generated types", path.display());
    }
}

#[test]
fn files_stay_readable() {
    for (path, code) in crate_sources() {
        let lines = code.lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines; split it by purpose", path.display());
    }
}
