//! Batches and the order of examples.

use nibble::data::{Batching, Example, IGNORE, Part, Sampler, collate};
use proptest::prelude::*;

#[test]
fn labels_are_shifted_within_each_example() {
    let first = Example { ids: vec![5, 6, 7], labels: vec![IGNORE, 6, 7] };
    let second = Example { ids: vec![8, 9], labels: vec![8, 9] };
    let batch = collate(&[&first, &second]);
    assert_eq!(batch.ids, [5, 6, 7, 8, 9]);
    // 7 and 9 end their examples: nothing to predict there, and 8 is not predicted from another example's end.
    assert_eq!(batch.labels, [6, 7, -100, 9, -100]);
    assert_eq!(batch.lengths, [3, 2]);
    assert_eq!((batch.unmasked(), batch.tokens()), (3, 5));
    assert_eq!((first.unmasked(), second.unmasked()), (2, 1));
    assert_eq!((first.prompt_len(), second.prompt_len()), (1, 0));
}

/// Batches of `size` of one place's examples.
fn sampler(count: usize, size: usize, seed: u64, shuffle: bool) -> Sampler {
    Sampler::new(&[Part { count, weight: 1.0 }], Batching::Examples(size), seed, shuffle).unwrap()
}

/// The examples of an epoch, batch by batch.
fn epoch(sampler: &Sampler, epoch: usize) -> Vec<Vec<usize>> {
    let numbers = sampler.batches_of(epoch)..sampler.batches_of(epoch + 1);
    numbers.map(|batch| sampler.batch_indices(batch)).collect()
}

#[test]
fn file_order_without_shuffling() {
    let sampler = sampler(5, 2, 7, false);
    let steps: Vec<_> = (0..4).map(|step| sampler.batch_indices(step)).collect();
    assert_eq!(steps, [vec![0, 1], vec![2, 3], vec![4], vec![0, 1]]);
}

#[test]
fn orders_differ_by_epoch_and_seed_and_stay() {
    let epoch = |seed, epoch: usize| sampler(100, 100, seed, true).batch_indices(epoch);
    assert_ne!(epoch(1, 0), epoch(1, 1));
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_ne!(epoch(1, 0), (0..100).collect::<Vec<_>>());
    assert_eq!(epoch(1, 3), epoch(1, 3));
}

#[test]
fn nothing_to_deal_is_refused() {
    let refused = |count, weight, size| {
        let refused = Sampler::new(&[Part { count, weight }], Batching::Examples(size), 0, true);
        refused.unwrap_err().to_string()
    };
    assert!(refused(0, 1.0, 1).contains("0 examples"));
    assert!(refused(4, 0.1, 1).contains("0 examples"));
    assert!(refused(1 << 31, 2.0, 1).contains("expected 1 to 2^32"));
    assert!(refused(1, 1.0, 0).contains("--batch-size"));
}

#[test]
fn the_order_of_runs_that_were_begun_long_ago_stays() {
    // A resumed run would otherwise go on with other examples.
    let sampler = sampler(10, 4, 3, true);
    let batches: Vec<_> = (0..4).map(|batch| sampler.batch_indices(batch)).collect();
    assert_eq!(batches, [vec![0, 1, 7, 3], vec![5, 8, 4, 6], vec![9, 2], vec![4, 8, 9, 1]]);
}

#[test]
fn weights_repeat_or_choose() {
    let parts = [Part { count: 3, weight: 2.0 }, Part { count: 8, weight: 0.25 }, Part { count: 4, weight: 1.5 }];
    let sampler = Sampler::new(&parts, Batching::Examples(5), 1, true).unwrap();
    let mut shares = Vec::new();
    for number in 0..6 {
        let mut seen = epoch(&sampler, number).concat();
        seen.sort_unstable();
        let of = |range: std::ops::Range<usize>| seen.iter().copied().filter(move |index| range.contains(index));
        assert_eq!(of(0..3).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2]);
        assert_eq!(of(11..15).count(), 6);
        assert!((11..15).all(|index| of(index..index + 1).count() >= 1));
        shares.push(of(3..11).collect::<Vec<_>>());
    }
    assert!(shares.iter().all(|share| share.len() == 2 && share[0] != share[1]));
    // Another share each epoch.
    assert!(shares.iter().any(|share| share != &shares[0]), "{shares:?}");
    let plain = Sampler::new(&parts[1..2], Batching::Examples(5), 1, false).unwrap();
    assert!(epoch(&plain, 0).concat().is_sorted());
}

prop_compose! {
    fn example()(tokens in prop::collection::vec((0u32..50_000, any::<bool>()), 1..40)) -> Example {
        Example {
            ids: tokens.iter().map(|token| token.0).collect(),
            labels: tokens.iter().map(|&(id, learned)| if learned { i64::from(id) } else { IGNORE }).collect(),
        }
    }
}

proptest! {
    #[test]
    fn batches_keep_every_token_and_label(examples in prop::collection::vec(example(), 1..10)) {
        let batch = collate(&examples.iter().collect::<Vec<_>>());
        prop_assert_eq!(batch.ids.len(), batch.labels.len());
        prop_assert_eq!(batch.lengths.iter().sum::<usize>(), batch.ids.len());
        prop_assert_eq!(batch.unmasked(), examples.iter().map(Example::unmasked).sum::<usize>());
        let mut start = 0;
        for (example, &length) in examples.iter().zip(&batch.lengths) {
            prop_assert_eq!(length, example.ids.len());
            for i in 0..length {
                prop_assert_eq!(batch.ids[start + i] as u32, example.ids[i]);
                let next = example.labels.get(i + 1).copied().unwrap_or(IGNORE);
                prop_assert_eq!(i64::from(batch.labels[start + i]), next);
            }
            start += length;
        }
    }

    #[test]
    fn an_epoch_visits_each_example_once(
        examples in 1usize..200, batch_size in 1usize..250, seed: u64, epoch in 0usize..5, shuffle: bool,
    ) {
        let sampler = sampler(examples, batch_size, seed, shuffle);
        let steps = sampler.batches_of(1);
        let batches: Vec<_> = (epoch * steps..(epoch + 1) * steps).map(|step| sampler.batch_indices(step)).collect();
        prop_assert!(batches[..steps - 1].iter().all(|batch| batch.len() == batch_size));
        let mut seen = batches.concat();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..examples).collect::<Vec<_>>());
    }

    #[test]
    fn packed_batches_hold_each_example_once_and_no_more_than_fits(
        lengths in prop::collection::vec(1u32..60, 1..300), tokens in 60usize..400, seed: u64, number in 0usize..4,
        shuffle: bool,
    ) {
        let part = Part { count: lengths.len(), weight: 1.0 };
        let batching = Batching::Packed { lengths: lengths.clone(), tokens };
        let sampler = Sampler::new(&[part], batching.clone(), seed, shuffle).unwrap();
        let batches = epoch(&sampler, number);
        let held = |batch: &Vec<usize>| batch.iter().map(|&index| lengths[index] as usize).sum::<usize>();
        prop_assert!(batches.iter().all(|batch| !batch.is_empty() && held(batch) <= tokens));
        let mut seen = batches.concat();
        if !shuffle {
            prop_assert!(seen.is_sorted());
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
        // A sampler that begins in the middle, as after a resume, deals the same.
        let again = Sampler::new(&[part], batching, seed, shuffle).unwrap();
        let middle = sampler.batches_of(number) + batches.len() / 2;
        prop_assert_eq!(&again.batch_indices(middle), &batches[batches.len() / 2]);
        // Half full at least: two batches that would fit into one are not both made.
        let total: usize = lengths.iter().map(|&length| length as usize).sum();
        let efficiency = sampler.efficiency().unwrap();
        let first = epoch(&sampler, 0).len();
        prop_assert!((efficiency - total as f64 / (first * tokens) as f64).abs() < 1e-12);
        prop_assert!(first == 1 || efficiency > 0.5, "{}", efficiency);
    }
}

#[test]
fn packing_fills_batches() {
    // Lengths as of real examples: many short, few long.
    let lengths: Vec<u32> = (0..3000u64).map(|i| 20 + (i * i * 7919 % 491 * (i % 7 + 1) / 7) as u32).collect();
    let part = Part { count: lengths.len(), weight: 1.0 };
    let packed = |shuffle| {
        let batching = Batching::Packed { lengths: lengths.clone(), tokens: 2048 };
        Sampler::new(&[part], batching, 0, shuffle).unwrap().efficiency().unwrap()
    };
    assert!(packed(true) > 0.99, "{}", packed(true));
    assert!(packed(false) > 0.9, "{}", packed(false));
    assert!(sampler(3, 1, 0, true).efficiency().is_none());
}
