//! What all clients together may ask for per second, and who is next when that is used up.
//!
//! A request passes when the quota has room for it, and one that is larger than a second's worth when nothing of that is used
//! up; what it takes beyond that is paid back before the next one passes.
//!
//! The order is that of self-clocked fair queueing. A request is due at a virtual time: that of its client's last request, or
//! of the last request of all that has passed, whichever is later, plus what it takes of the quota. The earliest goes first. So
//! clients that ask for more than there is get equal shares, whatever the size and number of their requests, and nobody waits
//! for ever: what has passed makes everything due later that comes after it.

use super::config::Rates;
use crate::bucket::Bucket;
use crate::event::run_queue::RunQueue;
use crate::event::slots::Key;
use crate::proto::server::Load;
use std::mem;

/// For how long an unused quota is saved up, in milliseconds.
const BURST_MS: u64 = 1_000;
const NS_PER_S: u64 = 1_000_000_000;

/// When the requests of a client are due, in nanoseconds of virtual time.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// When the last one was that has passed.
    last_ns: u64,
    /// The virtual time from which its next request counts; fixed when that is looked at for the first time.
    from_ns: Option<u64>,
}

#[derive(Debug)]
struct Waiting {
    due_ns: u64,
    key: Key,
    load: Load,
    /// It has got its turn of the loop, and has not asked again yet.
    is_woken: bool,
}

/// The quota, and who waits for it.
#[derive(Debug)]
pub(super) struct Quota {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    /// The last one first.
    waiting: Vec<Waiting>,
    /// When the last request of all was due that has passed.
    last_ns: u64,
}

impl Quota {
    /// Nothing of it is used up.
    pub(super) fn new(rates: Rates, now_ms: u64) -> Self {
        let full = |rate: Option<u64>| rate.map(|per_s| Bucket::full(per_s, BURST_MS, now_ms));
        Self { requests: full(rates.requests), bytes: full(rates.bytes), waiting: Vec::new(), last_ns: 0 }
    }

    /// Changes it from now on, with nothing of it used up. Those who wait try again.
    pub(super) fn set(&mut self, rates: Rates, now_ms: u64, run: &mut RunQueue) {
        run.extend(self.waiting.drain(..).rev().map(|waiting| waiting.key));
        *self = Self { last_ns: self.last_ns, ..Self::new(rates, now_ms) };
    }

    /// What it is.
    pub(super) fn rates(&self) -> Rates {
        let rate = |bucket: &Option<Bucket>| bucket.as_ref().map(Bucket::per_s);
        Rates { requests: rate(&self.requests), bytes: rate(&self.bytes) }
    }

    /// True when there is any.
    pub(super) fn is_set(&self) -> bool {
        self.requests.is_some() || self.bytes.is_some()
    }

    /// True when the client `key` may ask for this now. Otherwise it waits, and [`Quota::wake`] says when it may try again.
    pub(super) fn admits(&mut self, key: Key, due: &mut Due, load: Load, now_ms: u64) -> bool {
        let from_ns = *due.from_ns.get_or_insert(due.last_ns.max(self.last_ns));
        let due_ns = from_ns.saturating_add(self.takes_ns(load));
        let place = self.waiting.binary_search_by(|other| (due_ns, key).cmp(&(other.due_ns, other.key)));
        let is_first = match place {
            Ok(place) => place + 1 == self.waiting.len(),
            Err(place) => place == self.waiting.len(),
        };
        if is_first && self.open_ms(load, now_ms) <= now_ms {
            if place.is_ok() {
                self.waiting.pop();
            }
            return true;
        }
        match place {
            Ok(place) => self.waiting.get_mut(place).into_iter().for_each(|own| own.is_woken = false),
            Err(place) => self.waiting.insert(place, Waiting { due_ns, key, load, is_woken: false }),
        }
        false
    }

    /// The requests of a client that have passed.
    pub(super) fn charge(&mut self, due: &mut Due, load: Load) {
        if load == Load::default() {
            return;
        }
        let from_ns = due.from_ns.take().unwrap_or(due.last_ns.max(self.last_ns));
        due.last_ns = from_ns.saturating_add(self.takes_ns(load));
        self.last_ns = self.last_ns.max(due.last_ns);
        self.requests.iter_mut().for_each(|bucket| bucket.take(load.requests));
        self.bytes.iter_mut().for_each(|bucket| bucket.take(load.bytes));
    }

    /// A client is gone.
    pub(super) fn forget(&mut self, key: Key) {
        self.waiting.retain(|waiting| waiting.key != key);
    }

    /// When the first of those that wait may pass.
    pub(super) fn opens_at_ms(&mut self, now_ms: u64) -> Option<u64> {
        let load = self.waiting.last().filter(|first| !first.is_woken)?.load;
        Some(self.open_ms(load, now_ms))
    }

    /// Wakes those that may pass now, as many as there is room for together. They keep their places until they ask again, so
    /// that none of them passes twice before the others.
    pub(super) fn wake(&mut self, now_ms: u64, run: &mut RunQueue) {
        let Some(mut together) = self.waiting.last().map(|first| first.load) else { return };
        if self.open_ms(together, now_ms) > now_ms {
            return;
        }
        let requests = self.requests.as_ref();
        let bytes = self.bytes.as_ref();
        for (n, waiting) in self.waiting.iter_mut().rev().enumerate() {
            if n > 0 {
                together += waiting.load;
                let holds = |bucket: Option<&Bucket>, amount| bucket.is_none_or(|bucket| bucket.holds(amount));
                if !holds(requests, together.requests) || !holds(bytes, together.bytes) {
                    return;
                }
            }
            if !mem::replace(&mut waiting.is_woken, true) {
                run.push(waiting.key);
            }
        }
    }

    fn open_ms(&mut self, load: Load, now_ms: u64) -> u64 {
        let requests_ms = self.requests.as_mut().map_or(now_ms, |bucket| bucket.open_for(load.requests, now_ms));
        let bytes_ms = self.bytes.as_mut().map_or(now_ms, |bucket| bucket.open_for(load.bytes, now_ms));
        requests_ms.max(bytes_ms)
    }

    /// The time in which the quota earns this.
    fn takes_ns(&self, load: Load) -> u64 {
        let takes = |amount: u64, bucket: &Option<Bucket>| {
            bucket.as_ref().map_or(0, |bucket| amount.saturating_mul(NS_PER_S) / bucket.per_s())
        };
        takes(load.requests, &self.requests).max(takes(load.bytes, &self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::slots::Slots;

    const MIB: u64 = 1 << 20;

    /// Clients that always have a next request, each of one size.
    struct Crowd {
        quota: Quota,
        clients: Vec<(Key, Due, Load)>,
        /// What each has had.
        had: Vec<Load>,
        run: RunQueue,
    }

    impl Crowd {
        fn new(rates: Rates, sizes: &[u64]) -> Self {
            let mut slots = Slots::default();
            let mut key = || slots.try_insert_with(|_| Ok::<_, ()>(())).unwrap();
            let clients = sizes.iter().map(|&bytes| (key(), Due::default(), Load { requests: 1, bytes })).collect();
            let had = vec![Load::default(); sizes.len()];
            let mut crowd = Self { quota: Quota::new(rates, 0), clients, had, run: RunQueue::default() };
            crowd.run.extend(crowd.clients.iter().map(|client| client.0));
            crowd
        }

        /// One turn of the loop; says how many clients were looked at.
        fn turn(&mut self, now_ms: u64) -> usize {
            self.quota.wake(now_ms, &mut self.run);
            let mut batch = Vec::new();
            self.run.take_batch(&mut batch);
            for key in &batch {
                let n = self.clients.iter().position(|client| client.0 == *key).unwrap();
                let (_, due, load) = &mut self.clients[n];
                while self.quota.admits(*key, due, *load, now_ms) {
                    self.quota.charge(due, *load);
                    self.had[n] += *load;
                }
            }
            batch.len()
        }

        /// As the loop does it: a turn whenever somebody may pass.
        fn run_until(&mut self, end_ms: u64) -> usize {
            let (mut now_ms, mut looks) = (0, 0);
            while now_ms < end_ms {
                looks += self.turn(now_ms);
                now_ms = self.quota.opens_at_ms(now_ms).unwrap().max(now_ms + 1);
            }
            looks
        }
    }

    fn rates(requests: u64, bytes: u64) -> Rates {
        let some = |rate| Some(rate).filter(|&rate| rate > 0);
        Rates { requests: some(requests), bytes: some(bytes) }
    }

    #[test]
    fn a_quota_is_kept_whatever_is_asked() {
        for (rates, sizes) in [
            (rates(100, 0), vec![0, 4096, MIB]),
            (rates(0, MIB), vec![4096; 5]),
            (rates(0, MIB), vec![512, 16 * MIB]),
            (rates(50, MIB), vec![4096, 100_000]),
        ] {
            let mut crowd = Crowd::new(rates, &sizes);
            let looks = crowd.run_until(100_000);
            let all = crowd.had.iter().fold(Load::default(), |all, had| all + *had);
            // A second's worth is there at the start, and the last request may be as large as it likes.
            let percent = |rate: Option<u64>, had: u64| rate.map(|rate| had * 100 / (rate * 101));
            let shares = [percent(rates.requests, all.requests), percent(rates.bytes, all.bytes)];
            assert!(
                (97..116).contains(&shares.into_iter().flatten().max().unwrap()),
                "{rates:?} {sizes:?}: {shares:?}"
            );
            assert!(looks as u64 <= 2 * all.requests + 10, "{looks} looks for {all:?}");
        }
    }

    #[test]
    fn everybody_has_the_same_share() {
        for (rates, sizes) in
            [(rates(1_000, 0), vec![4096; 7]), (rates(0, 10 * MIB), vec![512, 4096, 100_000, MIB, 20 * MIB])]
        {
            let mut crowd = Crowd::new(rates, &sizes);
            crowd.run_until(600_000);
            let had = |load: &Load| if rates.requests.is_some() { load.requests } else { load.bytes };
            let (least, most) = (crowd.had.iter().map(had).min().unwrap(), crowd.had.iter().map(had).max().unwrap());
            assert!(least * 10 >= most * 9, "{:?}", crowd.had);
        }
    }

    #[test]
    fn those_who_come_again_and_again_starve_nobody() {
        let mut slots = Slots::default();
        let mut key = || slots.try_insert_with(|_| Ok::<_, ()>(())).unwrap();
        let mut quota = Quota::new(rates(0, MIB), 0);
        let (old, mut due) = (key(), Due::default());
        let large = Load { requests: 1, bytes: MIB };
        assert!(quota.admits(old, &mut due, large, 0));
        quota.charge(&mut due, large);
        assert!(!quota.admits(old, &mut due, large, 0));
        // Each of these is new and asks once.
        let small = Load { requests: 1, bytes: MIB / 10 };
        let mut passed = 0;
        let mut run = RunQueue::default();
        for now_ms in (0..10_000).step_by(10) {
            let (new, mut its) = (key(), Due::default());
            if quota.admits(new, &mut its, small, now_ms) {
                quota.charge(&mut its, small);
                passed += 1;
            }
            quota.wake(now_ms, &mut run);
            let mut batch = Vec::new();
            run.take_batch(&mut batch);
            if batch.contains(&old) {
                assert!(passed <= 20, "{passed} have passed before");
                return;
            }
            // They have gone.
            for &gone in &batch {
                quota.forget(gone);
            }
        }
        panic!("{passed} have passed, and it waits");
    }

    #[test]
    fn who_is_gone_leaves_nothing_and_a_change_wakes_all() {
        let mut crowd = Crowd::new(rates(1, 0), &[0, 0, 0]);
        assert_eq!((crowd.turn(0), crowd.quota.waiting.len()), (3, 3));
        let gone = crowd.clients[1].0;
        crowd.quota.forget(gone);
        assert_eq!(crowd.quota.waiting.len(), 2);
        crowd.quota.set(Rates::default(), 0, &mut crowd.run);
        assert_eq!((crowd.quota.opens_at_ms(0), crowd.quota.is_set()), (None, false));
        let mut batch = Vec::new();
        crowd.run.take_batch(&mut batch);
        assert_eq!(batch.len(), 2);
    }
}
