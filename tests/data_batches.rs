//! Batches and the order of examples.

use nibble::data::{Example, IGNORE, Sampler, collate};
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

#[test]
fn file_order_without_shuffling() {
    let sampler = Sampler::new(5, 2, 7, false).unwrap();
    let steps: Vec<_> = (0..4).map(|step| sampler.batch_indices(step)).collect();
    assert_eq!(steps, [vec![0, 1], vec![2, 3], vec![4], vec![0, 1]]);
}

#[test]
fn orders_differ_by_epoch_and_seed_and_stay() {
    let epoch = |seed, epoch: usize| Sampler::new(100, 100, seed, true).unwrap().batch_indices(epoch);
    assert_ne!(epoch(1, 0), epoch(1, 1));
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_ne!(epoch(1, 0), (0..100).collect::<Vec<_>>());
    assert_eq!(epoch(1, 3), epoch(1, 3));
}

#[test]
fn nothing_to_deal_is_refused() {
    assert!(Sampler::new(0, 1, 0, true).unwrap_err().to_string().contains("0 examples"));
    assert!(Sampler::new(1, 0, 0, true).unwrap_err().to_string().contains("--batch-size"));
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
        let sampler = Sampler::new(examples, batch_size, seed, shuffle).unwrap();
        let steps = sampler.steps_per_epoch();
        let batches: Vec<_> = (epoch * steps..(epoch + 1) * steps).map(|step| sampler.batch_indices(step)).collect();
        prop_assert!(batches[..steps - 1].iter().all(|batch| batch.len() == batch_size));
        let mut seen = batches.concat();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..examples).collect::<Vec<_>>());
    }
}
