//! Text token by token, and adapters that take turns: against whole sequences, and against each other.

use super::*;
use crate::{
    batch::{Request, generate_batch},
    generate,
    sampling::Sampling,
};
use std::sync::Arc;

#[test]
fn decoding_with_a_cache_gives_the_logits_of_the_whole_sequence() {
    let llama = model(config(2, 2, 4, 12, 10), true, Some((4, 0.0)), 3);
    let ids: Vec<i32> = (0..20).map(|i| (i * 5) % 11).collect();
    let whole = llama.logits(&ids, &[20]).unwrap();
    let rope = llama.config.rope.table(llama.config.head_dim, 32).unwrap();
    let mut cache = llama.cache(20).unwrap();
    let mut past = 0;
    for part in [&ids[..7], &ids[7..8], &ids[8..9], &ids[9..20]] {
        let logits = llama.next_logits(part, past, &rope, &mut cache).unwrap();
        past += part.len();
        let error = distance(&wide(&logits), &wide(&whole.rows(past - 1, 1).unwrap()));
        assert!(error < 1e-5, "{error} after {past}");
    }
    assert!(llama.next_logits(&[1], 20, &rope, &mut cache).is_err(), "the cache is full");
}

/// Adapters on and off by name give the logits, to the bit, of a model that has never had another.
#[test]
fn switching_adapters_exchanges_them_whole() {
    let ids = [1, 2, 3];
    let plain = |seed| model(config(2, 1, 2, 8, 8), true, Some((seed as usize + 1, 0.0)), seed);
    let adapter = |seed| plain(seed).adapter(everywhere(seed as usize + 1, 0.0)).unwrap();
    let bits = |llama: &Llama| llama.logits(&ids, &[3]).unwrap().bytes().unwrap().to_vec();
    let base = || {
        let mut llama = plain(5);
        llama.linears_mut().for_each(|linear| linear.lora = None);
        llama
    };
    let alone = |seed| {
        let mut llama = base();
        llama.set_adapter(&adapter(seed), "x".as_ref()).unwrap();
        bits(&llama)
    };
    let all = [bits(&base()), alone(1), alone(2)];
    assert!(all[0] != all[1] && all[1] != all[2]);
    let mut llama = base();
    for (name, seed) in [("one", 1), ("two", 2)] {
        llama.add_adapter(name, &adapter(seed), "x".as_ref()).unwrap();
    }
    for (name, number) in [(None, 0), (Some("two"), 2), (Some("one"), 1), (Some("one"), 1), (None, 0), (Some("two"), 2)]
    {
        llama.switch_adapter(name).unwrap();
        assert!(bits(&llama) == all[number], "{name:?}");
        assert_eq!((llama.adapters.active(), llama.adapters.names()), (name, vec!["one", "two"]));
    }
    let error = llama.switch_adapter(Some("three")).unwrap_err().to_string();
    assert!(error.contains("one, two"), "{error}");
    assert!(llama.add_adapter("one", &adapter(1), "x".as_ref()).unwrap_err().to_string().contains("NAME=DIR"));
    assert!(bits(&llama) == all[2], "mistakes change nothing");
}

/// Rows of a batch write what each writes alone with its adapter: of several ranks and scales, a DoRA, none, some twice, of
/// several lengths, and some that end before others.
fn mixed_as_alone(llama: &mut Llama) {
    let names = ["one", "two", "dora"];
    let request = |prompt: &[u32], adapter: Option<&str>| Request {
        prompt: prompt.to_vec(),
        adapter: adapter.map(str::to_string),
    };
    let requests = [
        request(&[1, 2, 3], Some("two")),
        request(&[4], None),
        request(&[1, 2, 3], Some("one")),
        request(&[5, 6, 7, 8, 9, 10, 1], Some("dora")),
        request(&[1, 2, 3], None),
        request(&[7, 7], Some("two")),
    ];
    for sampling in [Sampling::GREEDY, Sampling { temperature: 1.0, seed: 3, ..Sampling::GREEDY }] {
        let mut texts = Vec::new();
        for Request { prompt, adapter } in &requests {
            llama.switch_adapter(adapter.as_deref()).unwrap();
            texts.push(generate::generate(llama, prompt, 9, &[3], sampling, |_| true).unwrap());
        }
        assert!(texts.iter().any(|text| text.len() < 9) && texts.iter().any(|text| text.len() == 9), "{texts:?}");
        assert!(texts[0] != texts[2] && texts[0] != texts[4]);
        // Whichever is on the layers.
        for active in [None, Some("one")] {
            llama.switch_adapter(active).unwrap();
            let mut heard = vec![Vec::new(); requests.len()];
            let found = generate_batch(llama, &requests, 9, &[3], sampling, |number, token| {
                heard[number].push(token);
                true
            });
            assert_eq!((found.unwrap(), heard), (texts.clone(), texts.clone()));
        }
    }
    assert_eq!(llama.mixture(&names).unwrap().owner(Some("dora")).unwrap(), 2);
    assert!(llama.mixture(&["three"]).is_err());
    assert!(generate_batch(llama, &[request(&[], None)], 9, &[], Sampling::GREEDY, |_, _| true).is_err());
}

#[test]
fn a_mixed_batch_writes_what_each_row_writes_alone() {
    let shape = || config(2, 2, 2, 12, 8);
    for quantized in [false, true] {
        let mut llama = model(shape(), quantized, Some((1, 0.0)), 5);
        llama.linears_mut().for_each(|linear| linear.lora = None);
        let targets = Some(TargetModules::Names(vec!["q_proj".into(), "down_proj".into()]));
        let few = AdapterConfig { target_modules: targets, ..everywhere(3, 0.0) };
        let dora = AdapterConfig { use_dora: true, ..everywhere(2, 0.0) };
        for (name, settings) in [("one", few), ("two", everywhere(5, 0.0)), ("dora", dora)] {
            let adapter = model_with(shape(), quantized, Some(settings.clone()), name.len() as u64 + 40);
            llama.add_adapter(name, &adapter.adapter(settings).unwrap(), "x".as_ref()).unwrap();
        }
        mixed_as_alone(&mut llama);
    }
}

/// What a conversation reads again, and what it does not, makes no difference to its text.
#[test]
fn a_sequence_continues_as_a_new_one_would() {
    let llama = model(config(2, 1, 2, 8, 8), false, None, 1);
    let limits = generate::Limits { max_new: 6, stop: &[] };
    let mut sequence = generate::Sequence::with_capacity(&llama, 10).unwrap();
    for text in [&[1, 2, 3][..], &[1, 2, 3, 4, 5, 6, 7], &[1, 2, 3], &[1, 3], &[5]] {
        for sampling in [Sampling::GREEDY, Sampling { temperature: 1.0, seed: 3, ..Sampling::GREEDY }] {
            let found = sequence.continue_with(&llama, text, limits, sampling, |_| true).unwrap();
            let fresh = generate::generate(&llama, text, 6, &[], sampling, |_| true).unwrap();
            assert_eq!(found, fresh, "{text:?}");
        }
    }
    assert!(sequence.continue_with(&llama, &[], limits, Sampling::GREEDY, |_| true).is_err());
}

/// The model on a GPU, in a 16-bit type.
fn on_gpu(mut llama: Llama, device: Device, dtype: DType) -> Llama {
    let there = |tensor: &Tensor| tensor.to_device(device, Tag::Weights).unwrap();
    let wide = |param: &mut Param| param.value = there(&param.value);
    let table = |param: &mut Param<Table>| {
        let Table::Dense(tensor) = &param.value else { return };
        param.value = Table::Dense(there(&tensor.cast(dtype, Tag::Weights).unwrap()));
    };
    table(&mut llama.embedding);
    llama.head.iter_mut().for_each(table);
    wide(&mut llama.norm);
    for layer in &mut llama.layers {
        [&mut layer.input_norm, &mut layer.post_norm].into_iter().for_each(wide);
        for linear in layer.linears_mut() {
            if let Weight::Quantized(quantized) = &linear.weight {
                linear.weight = Weight::Quantized(quantized.to_device(device, Tag::Weights).unwrap());
            }
        }
    }
    Llama { dtype, ..llama }
}

/// Adapters of several ranks and targets, one a DoRA, added to the model under names.
fn add_adapters(llama: &mut Llama, shape: LlamaConfig, names: [&str; 3]) {
    let dora = AdapterConfig { use_dora: true, ..everywhere(2, 0.0) };
    let targets = Some(TargetModules::Names(vec!["q_proj".into(), "up_proj".into(), "down_proj".into()]));
    let few = AdapterConfig { target_modules: targets, ..everywhere(8, 0.0) };
    for (name, settings) in names.into_iter().zip([everywhere(4, 0.0), few, dora]) {
        let adapter = model_with(shape.clone(), true, Some(settings.clone()), name.len() as u64 + 40);
        llama.add_adapter(name, &adapter.adapter(settings).unwrap(), "x".as_ref()).unwrap();
    }
}

/// Steps of the decoder, recorded and not, give the logits of passes over the same tokens: rows of several adapters and
/// lengths, of which one ends before the others.
#[test]
fn gpu_steps_of_a_decoder_give_what_passes_give() {
    let Some(device) = nibble_runtime::cuda::device_for_tests() else { return };
    let shape = config(2, 3, 16, 128, 192);
    for dtype in [DType::BF16, DType::F16] {
        let mut base = model(shape.clone(), true, Some((1, 0.0)), 3);
        base.linears_mut().for_each(|linear| linear.lora = None);
        let mut llama = on_gpu(base, device, dtype);
        let names = ["one", "two", "dora"];
        add_adapters(&mut llama, shape.clone(), names);
        let mixture = Arc::new(llama.mixture(&names).unwrap());
        let mut decoder = llama.decoder(&mixture).unwrap().expect("the kernels take this model");
        let capacity = 24;
        let rope = llama.config.rope.table(32, capacity).unwrap().to_device(device).unwrap();
        // Reads so many tokens more of each row, behind `past` of them and with this adapter, in a pass.
        let pass = |rows: &[(usize, i32)], counts: &[usize], ids: &[i32], cache: &mut [LayerCache]| {
            let (mut spans, mut owners, mut last) = (Vec::new(), Vec::new(), Vec::new());
            for (i, (&(past, owner), &count)) in rows.iter().zip(counts).enumerate() {
                spans.push((i * capacity, past, count));
                owners.extend(vec![owner; count]);
                last.push(owners.len() - 1);
            }
            let pass = Pass::batched(&llama.config, &spans, &rope).unwrap().mixed(Arc::clone(&mixture), &owners);
            llama.last_logits(ids, &pass.unwrap().to_device(device).unwrap(), &last, cache).unwrap()
        };
        let mut rows = vec![(0, 0), (0, 2), (0, -1), (0, 1), (0, 0)];
        let [mut cache, mut other] = [(); 2].map(|()| llama.cache(capacity * rows.len()).unwrap());
        let lengths = [4, 1, 10, 6, 2];
        let ids: Vec<i32> = (0..23).map(|i| i * 7 % 11).collect();
        for cache in [&mut cache, &mut other] {
            pass(&rows, &lengths, &ids, cache);
        }
        rows.iter_mut().zip(lengths).for_each(|(row, length)| row.0 = length);
        for step in 0..8 {
            if step == 5 {
                rows.pop();
            }
            let ids: Vec<i32> = (0..rows.len() as i32).map(|i| (3 * i + step) % 11).collect();
            let expected = pass(&rows, &vec![1; rows.len()], &ids, &mut other);
            let row = |(i, &(position, owner)): (usize, &(usize, i32))| Row { position, first: i * capacity, owner };
            let at: Vec<Row> = rows.iter().enumerate().map(row).collect();
            let found = decoder.logits(&llama, &ids, &at, &rope, &mut cache).unwrap();
            let [found, expected] = [found, expected].map(|logits| logits.into_device(Device::Cpu, Tag::Workspace));
            let error = distance(&wide(&found.unwrap()), &wide(&expected.unwrap()));
            assert!(error < 3e-2, "{dtype}, step {step}: {error}");
            rows.iter_mut().for_each(|row| row.0 += 1);
        }
        let outside = [Row { position: capacity, first: 0, owner: 0 }];
        assert!(decoder.logits(&llama, &[1], &outside, &rope, &mut cache).is_err());
    }
}
