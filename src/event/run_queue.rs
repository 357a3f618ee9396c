//! The slots that can go on although no event will say so, each once.

use super::slots::Key;

/// The slots that have work, in the order in which they came.
///
/// Invariant 1: `queued[i]` is the last of the keys in `queue` whose index is `i`, or `None` when there is none. So a live
/// key is in the queue at most once, and one of an older generation does not keep its successor out.
#[derive(Debug, Default)]
pub struct RunQueue {
    queue: Vec<Key>,
    queued: Vec<Option<Key>>,
}

impl RunQueue {
    /// Puts `key` at the end, unless it is in the queue. All keys must be of one [`super::slots::Slots`], so that their
    /// indices are small.
    pub fn push(&mut self, key: Key) {
        if self.queued.len() <= key.index() {
            self.queued.resize(key.index() + 1, None);
        }
        if let Some(queued) = self.queued.get_mut(key.index()) {
            if *queued != Some(key) {
                *queued = Some(key);
                self.queue.push(key);
            }
        }
    }

    /// Moves all keys into `batch`, in order, and drops what was there. What is pushed from then on belongs to the next batch.
    /// The two swap their memory, so a caller that keeps `batch` allocates nothing.
    pub fn take_batch(&mut self, batch: &mut Vec<Key>) {
        batch.clear();
        std::mem::swap(&mut self.queue, batch);
        for key in batch {
            if let Some(queued) = self.queued.get_mut(key.index()) {
                *queued = None;
            }
        }
    }

    /// Moves all keys of another queue to the end of this one.
    pub fn append(&mut self, other: &mut Self) {
        for key in other.queue.drain(..) {
            if let Some(queued) = other.queued.get_mut(key.index()) {
                *queued = None;
            }
            self.push(key);
        }
    }

    /// True when no slot has work.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

impl Extend<Key> for RunQueue {
    fn extend<T: IntoIterator<Item = Key>>(&mut self, keys: T) {
        keys.into_iter().for_each(|key| self.push(key));
    }
}

#[cfg(test)]
mod tests {
    use super::super::slots::Slots;
    use super::*;

    fn insert(slots: &mut Slots<()>) -> Key {
        slots.try_insert_with(|_| Ok::<_, ()>(())).unwrap()
    }

    fn push_all(run: &mut RunQueue, keys: &[Key]) {
        for &key in keys {
            run.push(key);
        }
    }

    #[test]
    fn each_key_runs_once_a_batch_in_order() {
        let mut slots = Slots::default();
        let [a, b, c] = [(); 3].map(|()| insert(&mut slots));
        let mut run = RunQueue::default();
        let mut batch = Vec::new();
        push_all(&mut run, &[c, a, c, a]);
        run.take_batch(&mut batch);
        assert_eq!(batch, [c, a]);
        assert!(run.is_empty());
        push_all(&mut run, &[b, c]);
        assert!(!run.is_empty());
        run.take_batch(&mut batch);
        assert_eq!(batch, [b, c]);
        run.take_batch(&mut batch);
        assert_eq!(batch, []);
    }

    #[test]
    fn a_stale_key_does_not_keep_its_successor_out() {
        let mut slots = Slots::default();
        let old = insert(&mut slots);
        let mut run = RunQueue::default();
        run.push(old);
        slots.remove(old);
        let new = insert(&mut slots);
        push_all(&mut run, &[new, new]);
        let mut batch = Vec::new();
        run.take_batch(&mut batch);
        assert_eq!(batch, [old, new]);
        run.push(new);
        assert!(!run.is_empty());
    }

    #[test]
    fn batches_reuse_their_memory() {
        let mut slots = Slots::default();
        let keys: Vec<Key> = (0..100).map(|_| insert(&mut slots)).collect();
        let (mut run, mut batch) = (RunQueue::default(), Vec::new());
        for _ in 0..2 {
            push_all(&mut run, &keys);
            run.take_batch(&mut batch);
        }
        let capacities = [run.queue.capacity(), batch.capacity()];
        for _ in 0..10 {
            push_all(&mut run, &keys);
            run.take_batch(&mut batch);
        }
        assert_eq!([run.queue.capacity(), batch.capacity()], capacities);
    }
}
