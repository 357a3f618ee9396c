//! Text from elsewhere, fit for a terminal, for one line of a log and for a string of JSON.

use std::fmt::Write;

/// Appends a character; a control character, which could drive a terminal or forge a line, as JSON escapes it (RFC 8259,
/// section 7): `\n`, `\u001b`.
pub fn push(text: &mut String, character: char) {
    match character {
        '\n' => text.push_str("\\n"),
        '\r' => text.push_str("\\r"),
        '\t' => text.push_str("\\t"),
        _ if character.is_control() => {
            // Writing to a String cannot fail.
            let _ = write!(text, "\\u{:04x}", u32::from(character));
        }
        _ => text.push(character),
    }
}

/// The text with its control characters escaped.
pub fn escape(text: impl IntoIterator<Item = char>) -> String {
    let mut escaped = String::new();
    text.into_iter().for_each(|character| push(&mut escaped, character));
    escaped
}

/// The most characters of it that [`shorten`] leaves of a text: more than any address with a mask.
const SHORT_MAX: usize = 128;

/// The beginning of a text, with its control characters escaped; three dots say that there was more.
pub fn shorten(text: &str) -> String {
    let mut chars = text.chars();
    let mut short = escape(chars.by_ref().take(SHORT_MAX));
    if chars.next().is_some() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_nothing_else() {
        let text = "a\nb\r\t\0\u{1b}[2J\u{7f}\u{85}\u{9b}\\\"é\u{2003}🦀";
        let escaped = "a\\nb\\r\\t\\u0000\\u001b[2J\\u007f\\u0085\\u009b\\\"é\u{2003}🦀";
        assert_eq!(escape(text.chars()), escaped);
        assert_eq!(escape(escaped.chars()), escaped, "what is escaped stays as it is");
        let controls = ('\0'..=char::MAX).filter(|character| character.is_control());
        assert!(controls.clone().all(|control| escape([control]).bytes().all(|byte| byte.is_ascii_graphic())));
        assert_eq!(controls.max(), Some('\u{9f}'));
    }
}
