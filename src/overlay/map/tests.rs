use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::failpoint::properties;

const TIB: u64 = (1 << 40) / BLOCK;

/// The state of each block, by what was said last.
#[derive(Default)]
struct Model(BTreeMap<u64, State>);

impl Model {
    fn set(&mut self, blocks: Range<u64>, state: State) -> (u64, u64) {
        let mut change = (0, 0);
        for b in blocks {
            let old = self.0.insert(b, state).unwrap_or(State::Untouched);
            change.0 += u64::from(state == State::Data && old != State::Data);
            change.1 += u64::from(state != State::Data && old == State::Data);
        }
        change
    }

    fn get(&self, block: u64) -> State {
        self.0.get(&block).copied().unwrap_or(State::Untouched)
    }
}

fn states(map: &DirtyMap, blocks: Range<u64>) -> Vec<State> {
    let (mut found, mut at) = (Vec::new(), blocks.start);
    while at < blocks.end {
        let (state, end) = map.run(at, blocks.end);
        assert!(end > at && end <= blocks.end);
        found.extend((at..end).map(|_| state));
        at = end;
    }
    found
}

/// All records that `map` has changed, in another map of the same size.
fn reloaded(map: &DirtyMap) -> DirtyMap {
    let other = DirtyMap::new(map.blocks, true);
    for r in map.take_changed(usize::MAX) {
        let (count, len) = map.records(r.place.0);
        assert!(r.place.1 < count && r.bytes.len() as u64 == len, "{r:?}");
        other.put(r.place, &r.bytes);
    }
    other
}

proptest! {
    #![proptest_config(properties(64))]

    #[test]
    fn any_order_of_data_and_zeros_reads_as_said_and_is_the_same_from_disk(
        steps in proptest::collection::vec((0..40_000_u64, 1..9_000_u64, any::<bool>()), 1..24),
    ) {
        let (map, mut model) = (DirtyMap::new(50_000, true), Model::default());
        let mut weight = DirtyMap::WEIGHT;
        for (start, len, is_data) in steps {
            let blocks = start..start + len;
            let (change, cost) = match is_data {
                true => {
                    let cost = map.cost_of_data(blocks.clone());
                    (map.set_data(blocks.clone()), cost)
                }
                false => {
                    let cost = map.cost_of_zero(blocks.clone());
                    (map.set_zero(blocks.clone()), cost)
                }
            };
            let state = if is_data { State::Data } else { State::Zero };
            prop_assert_eq!((change.added, change.removed), model.set(blocks, state));
            prop_assert_eq!(Cost::of_data(change.added * BLOCK) + change.grown, cost);
            weight = weight + change.grown;
        }
        let want: Vec<State> = (0..50_000).map(|b| model.get(b)).collect();
        prop_assert_eq!(&states(&map, 0..50_000), &want);
        let data = want.iter().filter(|s| **s == State::Data).count() as u64;
        prop_assert_eq!(map.weigh(), (data, weight));
        prop_assert_eq!(&states(&reloaded(&map), 0..50_000), &want);
        prop_assert!(map.take_changed(usize::MAX).is_empty());
    }
}

#[test]
fn a_huge_disk_costs_what_was_written() {
    let map = DirtyMap::new(i64::MAX as u64 / BLOCK, true);
    assert_eq!(map.run(0, 7 * TIB), (State::Untouched, 7 * TIB.min(512 * TIB)));
    assert_eq!(map.set_data(5_000_000 * TIB + 7..5_000_000 * TIB + 8).added, 1);
    let cost = map.weigh().1.disk;
    assert!(cost < 100 << 10, "{cost}");
    // A whole disk as zeros: bits.
    let (before, all) = (map.weigh().1.disk, 0..map.blocks);
    assert_eq!(map.set_zero(all).removed, 1);
    assert!(map.weigh().1.disk - before < 100 << 10);
    assert_eq!(map.run(3 * TIB, 4 * TIB).0, State::Zero);
    assert_eq!(map.run(5_000_000 * TIB + 7, map.blocks).0, State::Zero);
    assert!(map.take_changed(usize::MAX).len() < 20);
}

#[test]
fn what_changes_after_it_was_taken_is_taken_again() {
    let map = DirtyMap::new(TIB, true);
    map.set_data(0..1);
    assert_eq!(map.take_changed(10).len(), 1);
    map.set_data(0..1);
    assert_eq!(map.take_changed(10).len(), 0, "nothing has changed");
    map.set_data(1..2);
    map.set_data(5000..5001);
    let taken = [map.take_changed(1), map.take_changed(1), map.take_changed(1)];
    assert_eq!(taken.map(|t| t.len()), [1, 1, 0]);
    assert!(!map.is_empty() && DirtyMap::new(TIB, false).is_empty());
}
