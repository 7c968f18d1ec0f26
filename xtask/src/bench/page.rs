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
}
