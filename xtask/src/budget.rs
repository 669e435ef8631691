//! `cargo xtask budget`: the library stays small enough to read.
//!
//! Counts the code of the library's crates: no comments, documentation and blank lines, which the house rules ask for in
//! plenty, and no tests. The counting goes by lines and relies on rustfmt's layout, which CI enforces: an item ends at the first
//! line with its indentation and a closing brace.

use crate::Usage;
use crate::workspace::{root, shown};
use anyhow::{Context, Result, bail};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "budget",
    summary: "count the library's lines, cfg attributes and duplicates",
    usage: "\
Usage: cargo xtask budget

Counts the crates that make up the library, without tests: vm-accel, core, backend and whpx. Fails above 9,000
lines of code in one of them, 150 cfg attributes or 500 duplicated lines in all, or 1,200 lines in a file.",
    run,
};

/// The library: what users call, what they call it with, what its backends share, and a backend that has its own.
const CRATES: [&str; 4] = ["vm-accel", "core", "backend", "whpx"];
/// In one crate.
const LINES: usize = 9_000;
const LINES_PER_FILE: usize = 1_200;
const CFGS: usize = 150;
const DUPLICATES: usize = 500;

/// So many lines that say something must be the same in two places to count as duplicated.
const WINDOW: usize = 8;

fn run(args: &[String]) -> Result<u8> {
    if !args.is_empty() {
        return Err(Usage::error("budget takes no arguments"));
    }
    let code = |files: &[Source]| files.iter().flat_map(|f| &f.lines).filter(|l| is_code(l)).count();
    let mut files = Vec::new();
    let mut largest = 0;
    for name in CRATES {
        let of_crate = sources(&root().join("crates").join(name).join("src"))?;
        println!("crates/{name}: {} lines of code", code(&of_crate));
        largest = largest.max(code(&of_crate));
        files.extend(of_crate);
    }
    let total: usize = files.iter().map(|f| f.lines.len()).sum();
    let cfgs: usize = files.iter().flat_map(|f| &f.lines).map(|l| cfgs(l)).sum();
    let duplicates = duplicates(&files);
    let longest = files.iter().max_by_key(|f| f.lines.len()).context("the library has sources")?;
    let longest_length = longest.lines.len();

    println!("{} files, {} lines of code, {total} with documentation and comments", files.len(), code(&files));
    println!("longest file: {} ({longest_length} lines without tests)", shown(&longest.path));
    for (place, lines) in &duplicates {
        println!("duplicated: {place}, {lines} lines");
    }
    let duplicated: usize = duplicates.iter().map(|(_, lines)| lines).sum();
    let mut over = Vec::new();
    for (what, is, limit) in [
        ("lines of code in the largest crate", largest, LINES),
        ("lines in the longest file", longest_length, LINES_PER_FILE),
        ("cfg attributes", cfgs, CFGS),
        ("duplicated lines", duplicated, DUPLICATES),
    ] {
        println!("{what}: {is} of at most {limit}");
        if is > limit {
            over.push(what);
        }
    }
    if !over.is_empty() {
        bail!("over budget: {}", over.join(", "));
    }
    Ok(0)
}

/// A source file without its tests.
struct Source {
    path: PathBuf,
    lines: Vec<String>,
}

/// The sources below `dir`, without tests, in order of their paths.
fn sources(dir: &Path) -> Result<Vec<Source>> {
    let mut paths = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", shown(&dir)))? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let mut sources = Vec::new();
    let mut test_modules = HashSet::new();
    for path in paths {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", shown(&path)))?;
        let (lines, modules) = without_tests(&text);
        test_modules.extend(modules.iter().map(|name| module_path(&path, name)));
        sources.push(Source { path, lines });
    }
    // A module that is compiled for tests only is `name.rs` or everything below `name/`.
    sources.retain(|s| !s.path.ancestors().any(|p| test_modules.contains(&p.with_extension(""))));
    Ok(sources)
}

/// Where the module `name` that `file` declares lies, without extension.
fn module_path(file: &Path, name: &str) -> PathBuf {
    match file.file_stem().and_then(|s| s.to_str()) {
        Some("lib" | "mod") => file.with_file_name(name),
        _ => file.with_extension("").join(name),
    }
}

/// The lines of a source without what stands below `#[cfg(test)]`, and the modules in other files declared that way.
fn without_tests(text: &str) -> (Vec<String>, Vec<String>) {
    let mut kept = Vec::new();
    let mut modules = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if line.trim() != "#[cfg(test)]" {
            kept.push(line.to_owned());
            continue;
        }
        // Further attributes, then the item: up to `;` on its line, or to the brace below its first column.
        let Some(item) = lines.by_ref().find(|l| !l.trim_start().starts_with("#[")) else {
            break;
        };
        if let Some(name) = item.trim().strip_prefix("mod ").and_then(|m| m.strip_suffix(';')) {
            modules.push(name.to_owned());
        }
        if !item.trim_end().ends_with([';', '}']) {
            let _ = lines.by_ref().find(|l| l.starts_with(indent) && l[indent.len()..].starts_with('}'));
        }
    }
    (kept, modules)
}

fn is_code(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.starts_with("//")
}

/// The conditions in a line of code.
fn cfgs(line: &str) -> usize {
    if !is_code(line) {
        return 0;
    }
    ["#[cfg(", "#![cfg(", "#[cfg_attr(", "#![cfg_attr(", "cfg!("].iter().map(|c| line.matches(c).count()).sum()
}

/// Stretches of at least [`WINDOW`] lines of code that occurred before: where, and how many lines.
fn duplicates(files: &[Source]) -> Vec<(String, usize)> {
    let mut seen = HashSet::new();
    let mut found: HashMap<(usize, usize), usize> = HashMap::new();
    let mut order = Vec::new();
    for (index, file) in files.iter().enumerate() {
        // Lines of brackets and imports repeat by themselves.
        let lines: Vec<(usize, &str)> = file
            .lines
            .iter()
            .enumerate()
            .map(|(n, l)| (n + 1, l.trim()))
            .filter(|(_, l)| is_code(l) && l.chars().any(char::is_alphanumeric) && !l.starts_with("use "))
            .collect();
        let mut run: Option<(usize, usize)> = None;
        for start in 0..(lines.len() + 1).saturating_sub(WINDOW) {
            let window: Vec<&str> = lines[start..start + WINDOW].iter().map(|(_, l)| *l).collect();
            if seen.insert(window) {
                run = None;
                continue;
            }
            // Windows that follow each other are one stretch.
            let first = match run {
                Some((first, next)) if next == start => first,
                _ => {
                    order.push((index, lines[start].0));
                    start
                }
            };
            run = Some((first, start + 1));
            found.insert((index, lines[first].0), start - first + WINDOW);
        }
    }
    order
        .into_iter()
        .map(|(index, line)| (format!("{}:{line}", shown(&files[index].path)), found[&(index, line)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_left_out() {
        let (kept, modules) = without_tests(
            "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {\n    }\n}\n#[cfg(test)]\nmod other;\n#[cfg(test)]\n#[rustfmt::skip]\nuse x::y;\nfn c() {}\n",
        );
        assert_eq!(kept, ["fn a() {}", "fn c() {}"]);
        assert_eq!(modules, ["other"]);
    }

    #[test]
    fn a_test_module_lies_beside_or_below() {
        assert_eq!(module_path(Path::new("src/lib.rs"), "t"), Path::new("src/t"));
        assert_eq!(module_path(Path::new("src/a/mod.rs"), "t"), Path::new("src/a/t"));
        assert_eq!(module_path(Path::new("src/a.rs"), "t"), Path::new("src/a/t"));
    }

    #[test]
    fn conditions_are_counted_outside_comments() {
        assert_eq!(cfgs("#[cfg(unix)] #[cfg_attr(unix, path = \"x\")]"), 2);
        assert_eq!(cfgs("    if cfg!(unix) {"), 1);
        assert_eq!(cfgs("/// #[cfg(unix)]"), 0);
    }

    #[test]
    fn a_repeated_stretch_counts_once() {
        let lines = |range: std::ops::Range<usize>| range.map(|n| format!("let a{n} = {n};")).collect::<Vec<_>>();
        let files = [
            Source { path: "a.rs".into(), lines: lines(0..20) },
            Source { path: "b.rs".into(), lines: [lines(100..103), lines(4..16)].concat() },
        ];
        assert_eq!(duplicates(&files), [("b.rs:4".to_owned(), 12)]);
        assert!(duplicates(&files[..1]).is_empty());
    }
}
