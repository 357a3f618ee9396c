//! PURE: the oracle of the control commands and their answers.

use super::choices::Choices;
use flexnbd::acl::Entry;
use flexnbd::command::{encode_command, parse_answer, Answer, Command, Reader};

/// Reads one command, at most `piece()` bytes at once.
fn read_command(text: &[u8], mut piece: impl FnMut(usize) -> usize) -> Result<Command, Answer> {
    let (mut reader, mut rest) = (Reader::default(), text);
    while !rest.is_empty() {
        let (next, later) = rest.split_at(piece(rest.len()));
        if let Some(command) = reader.push(next)? {
            return Ok(command);
        }
        rest = later;
    }
    reader.end_of_stream()
}

/// The answer as a client reads it.
fn transmit(answer: &Answer) -> Option<Answer> {
    let line = answer.encode();
    assert_eq!(line.iter().position(u8::is_ascii_control), Some(line.len() - 1), "one clean line");
    parse_answer(&line).ok().filter(|parsed| parsed.code == answer.code)
}

/// A control command, cut up; and the same bytes as an answer.
///
/// # Panics
/// When it matters how they are cut up, or when an answer or a good list of entries does not survive being sent.
pub fn control(data: &[u8]) {
    let (mut choices, text) = Choices::split(data);
    let command = read_command(text, |most| most);
    assert_eq!(read_command(text, |most| choices.piece(most)), command);
    match &command {
        Err(answer) => assert_eq!(transmit(answer).as_ref().map(|sent| sent.text.as_str()), Some(answer.text.trim())),
        Ok(Command::Acl(entries)) => {
            if let Some(bad) = entries.iter().find(|entry| entry.parse::<Entry>().is_err()) {
                assert!(transmit(&Answer::bad_spec(bad)).is_some());
            } else {
                let words: Vec<&str> = ["acl"].into_iter().chain(entries.iter().map(String::as_str)).collect();
                assert_eq!(read_command(&encode_command(&words), |most| most), command);
            }
        }
        Ok(_) => {}
    }
    if let Ok(answer) = parse_answer(text) {
        let once = transmit(&answer);
        assert!(once.is_some() && once == once.as_ref().and_then(transmit), "what is escaped stays as it is");
    }
}
