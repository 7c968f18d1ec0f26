//! Characters that nobody sees and that change what is seen around them.
//!
//! Job: tell them apart in what a stranger wrote, before it is shown. Input: a character. Must never call a letter one.

/// Whether it is a control (Unicode's Cc), a format character (Cf: directions of writing, joiners, tags) or ends a line or a
/// paragraph (Zl, Zp). A terminal obeys the first, and by the others a name looks like another one.
pub fn is_unseen(c: char) -> bool {
    // Cf of Unicode 17, in blocks: what lies between its characters in the last one is variation selectors or nothing.
    c.is_control()
        || matches!(c,
            '\u{ad}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{890}'..='\u{891}'
            | '\u{8e2}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{110bd}'
            | '\u{110cd}'
            | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_directions_and_line_ends_are_unseen_and_letters_are_not() {
        let unseen = "\u{0}\u{1b}\u{7f}\u{85}\u{9b}\u{ad}\u{200b}\u{200e}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}\u{feff}\u{e0041}";
        assert!(unseen.chars().all(is_unseen), "{unseen:?}");
        assert!(!"aZ0 -_ü\u{a0}Ж中한😀".chars().any(is_unseen));
    }
}
