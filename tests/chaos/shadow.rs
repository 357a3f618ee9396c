//! What may be in the bytes that belong to one writer: what was last acknowledged, or what was sent and not answered.

use std::ops::Range;

/// What a request makes of its range.
pub enum Change {
    /// WRITE of these bytes.
    Bytes(Vec<u8>),
    /// `WRITE_ZEROES`.
    Zeroes,
    /// TRIM: the bytes are as before or zero, and each read may say something else.
    Trim,
}

struct Sent {
    cookie: u64,
    range: Range<usize>,
    change: Change,
}

/// The bytes of one writer, who never has two changes of one byte under way over one connection. Ranges count from
/// their beginning.
pub struct Shadow {
    start: u64,
    /// What was last acknowledged.
    sure: Vec<u8>,
    /// Zero would be as good.
    or_zero: Vec<bool>,
    /// Sent and not answered, over the connection there is.
    sent: Vec<Sent>,
    /// Sent and not answered when an earlier connection ended: its server may do it still.
    lost: Vec<Sent>,
}

impl Shadow {
    /// The bytes from an offset of the image on.
    pub fn new(start: u64, content: Vec<u8>) -> Self {
        let or_zero = vec![false; content.len()];
        Self { start, sure: content, or_zero, sent: Vec::new(), lost: Vec::new() }
    }

    /// Where they are in the image.
    pub fn place(&self) -> Range<u64> {
        self.start..self.start + self.sure.len() as u64
    }

    /// True when a change of some of these bytes is under way.
    pub fn is_changing(&self, range: &Range<usize>) -> bool {
        self.sent.iter().any(|sent| sent.range.start < range.end && range.start < sent.range.end)
    }

    /// A request is about to be sent.
    pub fn send(&mut self, cookie: u64, range: Range<usize>, change: Change) {
        self.sent.push(Sent { cookie, range, change });
    }

    /// It was answered; a request that changes nothing is none of ours.
    pub fn answered(&mut self, cookie: u64) {
        let Some(at) = self.sent.iter().position(|sent| sent.cookie == cookie) else { return };
        let Sent { range, change, .. } = self.sent.swap_remove(at);
        match change {
            Change::Trim => return self.or_zero[range].fill(true),
            Change::Zeroes => self.sure[range.clone()].fill(0),
            Change::Bytes(bytes) => self.sure[range.clone()].copy_from_slice(&bytes),
        }
        self.or_zero[range].fill(false);
    }

    /// The connection has ended.
    pub fn disconnected(&mut self) {
        self.lost.append(&mut self.sent);
    }

    /// Fails when one of the bytes from `at` on cannot be what was `found`.
    #[track_caller]
    pub fn check(&self, at: usize, found: &[u8], what: &str) {
        // Mostly it is what is sure, and there may be a lot of it.
        if found == &self.sure[at..at + found.len()] {
            return;
        }
        let lost = self.lost_bytes(at, found);
        if let (Some(&first), Some(&last)) = (lost.first(), lost.last()) {
            panic!(
                "{what}: {} of {} bytes are not what was acknowledged, between offsets {} and {}; the first is {} \
                 instead of {}",
                lost.len(),
                found.len(),
                self.start + first as u64,
                self.start + last as u64,
                found[first - at],
                self.sure[first]
            );
        }
    }

    fn lost_bytes(&self, at: usize, found: &[u8]) -> Vec<usize> {
        let is_lost = |&(at, byte): &(usize, u8)| !self.allows(at, byte);
        (at..).zip(found.iter().copied()).filter(is_lost).map(|(at, _)| at).collect()
    }

    /// These bytes are there, and whoever could still change them is gone.
    #[track_caller]
    pub fn settle(&mut self, found: Vec<u8>, what: &str) {
        self.check(0, &found, what);
        assert!(self.sent.is_empty());
        self.lost.clear();
        self.or_zero.fill(false);
        self.sure = found;
    }

    fn allows(&self, at: usize, byte: u8) -> bool {
        let makes = |sent: &Sent| {
            sent.range.contains(&at)
                && match &sent.change {
                    Change::Bytes(bytes) => bytes[at - sent.range.start] == byte,
                    Change::Zeroes | Change::Trim => byte == 0,
                }
        };
        byte == self.sure[at] || byte == 0 && self.or_zero[at] || self.sent.iter().chain(&self.lost).any(makes)
    }
}

#[test]
fn a_shadow_knows_what_may_be_there() {
    let mut shadow = Shadow::new(100, vec![1; 8]);
    let fails = |shadow: &Shadow, found: &[u8]| !shadow.lost_bytes(0, found).is_empty();
    shadow.send(1, 0..4, Change::Bytes(vec![2; 4]));
    assert!(shadow.is_changing(&(3..5)) && !shadow.is_changing(&(4..8)));
    assert!(!fails(&shadow, &[1, 2, 1, 2, 1, 1, 1, 1]) && fails(&shadow, &[1, 1, 1, 1, 2, 1, 1, 1]));
    shadow.answered(1);
    assert!(fails(&shadow, &[1, 2, 2, 2, 1, 1, 1, 1]));
    shadow.send(2, 0..2, Change::Trim);
    shadow.answered(2);
    assert!(!fails(&shadow, &[2, 0, 2, 2, 1, 1, 1, 1]) && fails(&shadow, &[2, 1, 2, 2, 1, 1, 1, 1]));
    shadow.send(3, 2..4, Change::Zeroes);
    shadow.disconnected();
    assert!(!shadow.is_changing(&(2..4)));
    shadow.send(4, 0..4, Change::Bytes(vec![3; 4]));
    shadow.answered(4);
    // What an ended connection has left behind may be done after it.
    assert!(!fails(&shadow, &[3, 3, 3, 0, 1, 1, 1, 1]) && fails(&shadow, &[0, 3, 3, 3, 1, 1, 1, 1]));
    shadow.settle(vec![3, 3, 0, 3, 1, 1, 1, 1], "test");
    assert!(fails(&shadow, &[3, 3, 3, 3, 1, 1, 1, 1]));
}
