//! Tables on a page: each benchmark's between two marks, and nothing else touched.

use std::fs;

use anyhow::Context as _;

use crate::run::root;

/// Puts a benchmark's tables in the place of its last ones, on a page of docs/.
///
/// # Errors
///
/// The page has no such place.
pub fn replace(file: &str, name: &str, tables: &str) -> anyhow::Result<()> {
    let path = root().join("docs").join(file);
    let shown = path.display();
    let page = fs::read_to_string(&path).with_context(|| format!("cannot read {shown}"))?;
    let page = replaced(&page, name, tables).with_context(|| {
        format!("{shown} has no place for these tables: `<!-- {name} -->` and `<!-- /{name} -->`, each on a line")
    })?;
    fs::write(&path, page).with_context(|| format!("cannot write {shown}"))?;
    eprintln!("the tables are in {shown}");
    Ok(())
}

/// Writes a page of docs/; the tables of others on it stay as they are: an empty place in `page` is filled with what the file has
/// there.
///
/// # Errors
///
/// The file cannot be written.
pub fn write(file: &str, page: &str) -> anyhow::Result<()> {
    let path = root().join("docs").join(file);
    // There is none before the first run.
    let before = fs::read_to_string(&path).unwrap_or_default();
    fs::write(&path, filled(page, &before)).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("the page is {}", path.display());
    Ok(())
}

/// A page whose places have what the earlier one has in those of their names.
fn filled(page: &str, before: &str) -> String {
    let names = page.lines().filter_map(|line| {
        let name = line.strip_prefix("<!-- ")?.strip_suffix(" -->")?;
        (!name.starts_with('/')).then_some(name)
    });
    names.fold(page.to_owned(), |page, name| {
        let kept = before
            .split_once(&format!("<!-- {name} -->\n"))
            .and_then(|(_, rest)| rest.split_once(&format!("<!-- /{name} -->\n")));
        kept.and_then(|(tables, _)| replaced(&page, name, tables))
            .unwrap_or(page)
    })
}

fn replaced(page: &str, name: &str, tables: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->\n"));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}{}\n{end}{after}", tables.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let page = "# Figures\n<!-- relay -->\nold\n<!-- /relay -->\nprose\n<!-- kernel -->\n<!-- /kernel -->\n";
        let new = replaced(page, "relay", "| new |\n").expect("there is a place");
        assert_eq!(
            new,
            "# Figures\n<!-- relay -->\n| new |\n<!-- /relay -->\nprose\n<!-- kernel -->\n<!-- /kernel -->\n"
        );
        assert_eq!(replaced(page, "steer", ""), None);
    }

    #[test]
    fn a_new_page_keeps_what_others_have_written_on_it() {
        let page = |prose: &str, tables: &str| format!("# Figures\n{prose}\n<!-- vm -->\n{tables}<!-- /vm -->\n");
        assert_eq!(
            filled(&page("new", ""), &page("old", "| kept |\n")),
            page("new", "| kept |\n")
        );
        assert_eq!(filled(&page("new", ""), "# Figures\n"), page("new", ""));
    }
}
