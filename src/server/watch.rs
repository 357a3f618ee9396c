//! Whether a peer is still there that does not take what is sent to it.
//!
//! Keepalive does not run while data waits to be acknowledged; the kernel goes on trying for a quarter of an hour then. How
//! long ago the last acknowledgement came does not tell either: a peer that does not read has closed its window, and the
//! kernel asks it more and more rarely whether that has changed. So a peer is gone when it has acknowledged nothing for a
//! while and does not answer what was tried since.

use crate::sys::net::Delivery;

/// How often to look at a peer to which something is on its way, in milliseconds.
const LOOK_MS: u64 = 5_000;
/// A client that has acknowledged nothing for so long, in milliseconds, and does not answer, is gone.
pub(super) const GONE_MS: u64 = 45_000;
/// When two looks date the last acknowledgement less than this apart, in milliseconds, they mean the same one: a turn
/// may be so late. The intervals at which the kernel tries again soon are longer than this.
const SAME_MS: u64 = 1_000;

/// What was seen of a peer.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// When to look; `None` while nothing is on its way.
    due_ms: Option<u64>,
    /// What the peer's machine had not taken at the last question for that, in bytes; `None` since something was sent.
    untaken_bytes: Option<u32>,
    silence: Option<Silence>,
}

/// The time since the last acknowledgement.
#[derive(Debug, Clone, Copy)]
struct Silence {
    since_ms: u64,
    /// How often the kernel had tried when this was first seen.
    tries: u32,
    /// At the last look, it had tried since and there was no answer.
    unanswered: bool,
}

impl Watch {
    /// Something is sent.
    pub(super) fn note_sent(&mut self, now_ms: u64) {
        self.due_ms.get_or_insert(now_ms.saturating_add(LOOK_MS));
        self.untaken_bytes = None;
    }

    /// True while the peer's machine takes what was sent: less is on its way than at the last question, or this is the first.
    pub(super) fn takes_slowly(&mut self, delivery: Delivery) -> bool {
        let last = self.untaken_bytes.replace(delivery.pending_bytes);
        delivery.pending_bytes > 0 && last.is_none_or(|last| delivery.pending_bytes < last)
    }

    /// When to look at the peer, if that has to be.
    pub(super) fn due_ms(&self) -> Option<u64> {
        self.due_ms
    }

    /// Judges what the kernel says now. True: the peer is gone. A try at the moment of the look is not answered yet, so it
    /// takes two looks. `gone_ms` is how long it may acknowledge nothing, in milliseconds.
    pub(super) fn is_gone(&mut self, delivery: Delivery, gone_ms: u64, now_ms: u64) -> bool {
        if delivery.pending_bytes == 0 {
            *self = Self::default();
            return false;
        }
        self.due_ms = Some(now_ms.saturating_add(LOOK_MS));
        let since_ms = now_ms.saturating_sub(delivery.acked_ms_ago);
        let new = Silence { since_ms, tries: delivery.tries, unanswered: false };
        let mut silence = self.silence.filter(|old| since_ms <= old.since_ms.saturating_add(SAME_MS)).unwrap_or(new);
        let was_unanswered = silence.unanswered;
        silence.unanswered = delivery.probes > 0 || delivery.tries > silence.tries;
        self.silence = Some(silence);
        was_unanswered && silence.unanswered && delivery.acked_ms_ago >= gone_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When it is found to be gone, in milliseconds, by looks at what the kernel says: at which second, the age of the last
    /// acknowledgement in milliseconds, tries, probes.
    fn gone_at_s(looks: &[(u64, u64, u32, u32)]) -> Option<u64> {
        let mut watch = Watch::default();
        watch.note_sent(looks[0].0 * 1_000 - LOOK_MS);
        looks.iter().find_map(|&(at_s, acked_ms_ago, tries, probes)| {
            assert_eq!(watch.due_ms(), Some(at_s * 1_000));
            let delivery = Delivery { pending_bytes: 100, acked_ms_ago, tries, probes };
            watch.is_gone(delivery, GONE_MS, at_s * 1_000).then_some(at_s)
        })
    }

    // What Linux 6.18 has said of peers between two network namespaces.

    #[test]
    fn a_peer_whose_address_is_gone() {
        let mut looks = vec![(15, 15_020, 4, 0), (20, 20_020, 5, 0), (25, 25_020, 6, 0), (30, 30_020, 6, 0)];
        looks.extend([(35, 35_020, 6, 0), (40, 40_028, 7, 0), (45, 45_032, 7, 0), (50, 50_036, 7, 0)]);
        assert_eq!(gone_at_s(&looks), Some(45), "it has acknowledged nothing since 0");
    }

    #[test]
    fn a_peer_that_does_not_read_and_then_is_gone() {
        let mut looks = vec![(5, 1_648, 4, 0), (10, 3_160, 5, 0), (15, 1_248, 6, 0), (20, 6_248, 6, 0)];
        looks.extend([(25, 11_256, 6, 0), (30, 16_256, 7, 1), (35, 21_268, 7, 1), (40, 26_268, 7, 1)]);
        looks.extend([(45, 31_290, 7, 1), (50, 36_300, 7, 1), (55, 41_310, 8, 2), (60, 46_320, 8, 2)]);
        assert_eq!(gone_at_s(&looks), Some(60), "it has acknowledged nothing since 13.7");
        // The count of tries has an end.
        let mut looks: Vec<_> = (0..60).map(|n| (5 * n + 5, n % 3 * 5_000 + 1_300, 15, 0)).collect();
        looks.extend([(305, 16_200, 15, 1), (310, 21_200, 15, 1), (315, 26_200, 15, 2), (320, 31_200, 15, 2)]);
        looks.extend([(325, 36_200, 15, 2), (330, 41_200, 15, 3), (335, 46_200, 15, 3)]);
        assert_eq!(gone_at_s(&looks), Some(335));
    }

    /// It is asked every 100 s by then, and answers.
    #[test]
    fn a_peer_that_does_not_read_stays() {
        let mut looks: Vec<_> = (0..22).map(|n| (115 + 5 * n, n * 5_000 + 4_300, 9, 0)).collect();
        looks.extend((0..24).map(|n| (225 + 5 * n, n * 5_000 + 4_340, 10, 0)));
        assert_eq!(gone_at_s(&looks), None);
        // Each question may be on its way just when somebody looks.
        looks.push((345, 124_340, 11, 1));
        looks.extend((0..24).map(|n| (350 + 5 * n, n * 5_000 + 4_990, 11, 0)));
        looks.push((470, 124_990, 12, 1));
        looks.push((475, 4_990, 12, 0));
        assert_eq!(gone_at_s(&looks), None);
    }

    /// Or has had to drop what had been sent to it, so that it is sent again and again; each time it says so.
    #[test]
    fn a_peer_that_takes_nothing_stays() {
        let mut looks = Vec::new();
        let mut at_s = 5;
        for (tries, pause_s) in [(6, 10), (7, 25), (8, 50), (9, 100), (10, 120), (11, 120)] {
            looks.extend((0..pause_s / 5).map(|n| (at_s + 5 * n, n * 5_000 + 2_000, tries, 0)));
            at_s += pause_s;
        }
        assert_eq!(gone_at_s(&looks), None);
    }

    #[test]
    fn nobody_is_looked_at_to_whom_nothing_is_on_its_way() {
        let mut watch = Watch::default();
        assert_eq!(watch.due_ms(), None);
        watch.note_sent(1_000);
        watch.note_sent(4_000);
        assert_eq!(watch.due_ms(), Some(6_000));
        let mut delivery = Delivery { pending_bytes: 1, acked_ms_ago: 44_000, tries: 3, probes: 1 };
        assert!(!watch.is_gone(delivery, GONE_MS, 6_000));
        assert_eq!(watch.due_ms(), Some(11_000));
        delivery.pending_bytes = 0;
        assert!(!watch.is_gone(delivery, GONE_MS, 11_000));
        assert_eq!(watch.due_ms(), None);
        delivery = Delivery { pending_bytes: 1, acked_ms_ago: 80_000, ..delivery };
        assert!(!watch.is_gone(delivery, GONE_MS, 100_000), "one look is not enough");
        delivery.acked_ms_ago = 85_000;
        assert!(watch.is_gone(delivery, GONE_MS, 105_000));
    }
}
