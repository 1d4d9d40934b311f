use super::{
    Job,
    memory::{on_host, peak},
    room,
    room::Room,
    time::Rates,
};
use crate::{cli::Cli, model::Outline, settings::Settings};
use clap::Parser;
use nibble_models::{
    LlamaConfig,
    llama::{Activations, Keeping, SHAPES},
};
use nibble_runtime::{DType, Tag, cuda::Chip};
use proptest::prelude::*;

const H100: Chip = Chip { capability: (9, 0), sms: 132 };

/// Options of `bench-step` (which makes one micro-batch a step) on a model of random weights.
fn job(options: &str, chip: Option<Chip>) -> Job {
    let args = ["train-llama", "--data", "x", "--grad-accum", "1"].into_iter().chain(options.split_whitespace());
    let settings = Settings::resolve(&Cli::try_parse_from(args).unwrap().train, "").unwrap();
    let model = settings.model.as_ref().unwrap().to_str().unwrap();
    let config = LlamaConfig::shape(model.strip_prefix("random:").unwrap()).unwrap();
    Job::new(&Outline { config, stored: DType::BF16, quantized: None }, &settings, chip).unwrap()
}

/// With which kernels a step was measured.
#[derive(Clone, Copy)]
enum With {
    /// Attention of sm_80, and at most 256 rows of the head at a time.
    SmallHead,
    /// Attention of sm_80, and a head that trains multiplied in f32: the time of that is not planned any more.
    WideHead,
    /// The adapters of linears on one input one after another, and products of their own for each input gradient.
    OneByOne,
}
use With::{OneByOne, SmallHead, WideHead};

const QLORA: &str = "--model random:llama-3.1-8b --dropout 0 --seq-len 2048 --batch-size";
const FULL: &str = "--model random:llama-3.2-1b --method full --seq-len 2048 --batch-size 4 --recompute";

/// Steps measured on an H100 by bench-step, the first three on 2026-11-25 and the others on 2026-11-28: options, with which
/// kernels, GiB at the peak of all tags together (to a tenth, as printed) and tok/s.
const MEASURED: [(&str, &str, With, f64, f64); 13] = [
    (QLORA, "4", SmallHead, 28.9, 14573.),
    (QLORA, "1", SmallHead, 11.1, 12418.),
    (FULL, "--paged-budget off", WideHead, 24.1, 6094.),
    (QLORA, "4", OneByOne, 29.1, 15881.),
    (QLORA, "4 --recompute", OneByOne, 8.5, 12264.),
    (QLORA, "4 --activations inputs@host", OneByOne, 6.6, 12174.),
    (QLORA, "4 --activations attention@host:31,all", OneByOne, 7.0, 13227.),
    (QLORA, "4 --activations all@host:8,attention@host:23,all", OneByOne, 7.2, 11709.),
    (QLORA, "4 --embedding-bits 8", OneByOne, 28.6, 15508.),
    (QLORA, "1 --recompute", OneByOne, 6.0, 10718.),
    (LONG, "32768 --activations inputs", OneByOne, 18.3, 7110.),
    (LONG, "32768 --activations attention@host:31,all", OneByOne, 11.5, 8223.),
    (LONG, "32768 --activations attention@host --feed-forward-rows 8192", OneByOne, 9.0, 8013.),
];
const LONG: &str = "--model random:llama-3.1-8b --dropout 0 --batch-size 1 --seq-len";

/// The same measured on an H200 on 2026-11-29; those of rank 64 with products that were some 1.5 % slower.
const MEASURED_ON_H200: [(&str, f64, f64); 9] = [
    ("4", 29.1, 18008.),
    ("1", 11.1, 15892.),
    ("4 --activations attention@host:31,all", 7.0, 14892.),
    ("4 --recompute", 8.3, 13825.),
    ("4 --rank 64 --recompute", 10.8, 13414.),
    ("4 --rank 64 --recompute --paged-budget 480MiB", 9.5, 13375.),
    ("1 --dequantized-layers 32", 24.1, 17322.),
    ("1 --dequantized-layers 16", 17.6, 16327.),
    ("4 --dequantized-layers 32", 42.1, 18480.),
];

#[test]
fn measured_steps_on_an_h200() {
    for (options, gib, speed) in MEASURED_ON_H200 {
        let job = job(&format!("{QLORA} {options}"), Some(H100));
        let planned = peak(&job).unwrap().total_peak as f64 / f64::from(1u32 << 30);
        let estimate = Rates::of("NVIDIA H200", true).unwrap().0.speed(&job);
        println!(
            "| {options} | {gib} | {planned:.2} | {speed} | {estimate:.0} | {:+.1} % |",
            100.0 * (estimate / speed - 1.0)
        );
        assert!((planned - gib).abs() <= 0.03 * gib, "{options}: {planned} GiB");
        assert!((estimate / speed - 1.0).abs() <= 0.05, "{options}: {estimate} tok/s");
    }
}

#[test]
fn measured_steps() {
    println!("| step | GiB measured | planned | | tok/s measured | planned | |\n|---|---|---|---|---|---|---|");
    for (base, options, with, gib, speed) in MEASURED {
        let options = format!("{base} {options}");
        let job = job(&options, Some(H100));
        let planned = peak(&job).unwrap().total_peak as f64 / f64::from(1u32 << 30);
        let estimate = Rates::before(matches!(with, SmallHead)).speed(&job);
        let (off, time_off) = (planned / gib - 1.0, estimate / speed - 1.0);
        println!(
            "| {options} | {gib} | {planned:.2} | {:+.1} % | {speed} | {estimate:.0} | {:+.1} % |",
            100.0 * off,
            100.0 * time_off
        );
        // They had SwiGLU's output beside its gradient, which now takes its place.
        let more = (2 * job.tokens() * job.config.intermediate_size) as f64 / f64::from(1u32 << 30);
        assert!(off <= 0.03 && planned + more >= 0.97 * gib, "{options}: {planned} GiB");
        assert!(time_off.abs() <= 0.1 || matches!(with, WideHead), "{options}: {estimate} tok/s");
    }
}

/// What each tag takes, in the MiB that were printed; `None` where that was GiB to a tenth.
#[test]
fn measured_tags() {
    for (options, tags) in [
        // Its workspace was 257.5 MiB when the output of SwiGLU and its gradient were there together.
        ("1 --recompute", [None, Some(320.), Some(5.), Some(480.), Some(710.3), None]),
        ("4 --recompute", [None, Some(320.), Some(5.), Some(480.), None, Some(888.6)]),
        ("4 --activations inputs@host", [None, Some(320.), Some(5.), Some(480.), Some(868.6), Some(888.6)]),
    ] {
        let found = peak(&job(&format!("{QLORA} {options}"), Some(H100))).unwrap().peak;
        let measured =
            Tag::ALL.iter().zip(found).zip(tags).filter_map(|((tag, found), tags)| Some((tag, found, tags?)));
        for (tag, found, expected) in measured {
            let found = found as f64 / f64::from(1 << 20);
            assert!((found - expected).abs() <= 0.3, "{options}: {tag} {found} MiB, measured {expected}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// More tokens, rank or things kept on the device never take less; nor time, but that of a token.
    #[test]
    fn more_never_takes_less(
        shape in 0..SHAPES.len(), on_cpu: bool, batch in 1usize..5, length in 1usize..40, rank in 1usize..9,
        layers in 0usize..8, dropout: bool, full: bool, less in 0usize..3,
    ) {
        let less = ["inputs", "attention", "inputs"][less];
        let method = if full { "full" } else { "qlora" };
        let options = |batch: usize, length: usize, rank: usize, layers: usize| format!(
            "--model random:{} --batch-size {batch} --seq-len {} --rank {} --activations {less}:{layers},all --dropout {} --method {method}",
            SHAPES[shape], 64 * length, 8 * rank, if dropout { 0.1 } else { 0.0 },
        );
        let chip = (!on_cpu).then_some(H100);
        let total = |options: String| peak(&job(&options, chip)).unwrap().total_peak;
        let base = total(options(batch, length, rank, layers));
        prop_assert!(total(options(batch + 1, length, rank, layers)) >= base);
        prop_assert!(total(options(batch, length + 1, rank, layers)) >= base);
        prop_assert!(total(options(batch, length, rank + 1, layers)) >= base);
        prop_assert!(total(options(batch, length, rank, layers + 1)) <= base);
        let speed = |layers| Rates::reference().speed(&job(&options(batch, length, rank, layers), chip));
        prop_assert!(speed(layers + 1) <= speed(layers));
    }

    /// What is chosen fits, and is as fast as all that fits; what is advised where nothing fits does.
    #[test]
    fn the_choice_fits(mib in 64usize..40_000, layers in 0usize..=32, less in 0usize..5, host in 0usize..40_000) {
        let room = Room { host: host << 20, ..room(mib << 20) };
        let asked = job(&format!("{QLORA} 2 --paged-budget off"), Some(H100));
        match room.fastest(&asked).unwrap() {
            Some(choice) => {
                prop_assert!(room.holds(&choice.usage) && peak(&choice.job).unwrap() == choice.usage);
                prop_assert!(on_host(&choice.job) <= room.host);
                let less = room::cheaper(&asked).nth(less).unwrap();
                let other = room::keeping(&asked, Activations::new(less, layers, Keeping::default()));
                let fits = room.holds(&peak(&other).unwrap()) && on_host(&other) <= room.host;
                let speed = |job: &Job| Rates::reference().speed(job);
                prop_assert!(!fits || speed(&choice.job) >= speed(&other), "{} {}", choice.job.settings.activations, layers);
            }
            None => {
                prop_assert!(!room.holds(&peak(&room::least(&asked)).unwrap()) || on_host(&room::least(&asked)) > room.host);
                if let Some(options) = room::remedy(&asked, &room).unwrap() {
                    let options = options.replace("--grad-accum", "--save-every");
                    let kept = "--model random:llama-3.1-8b --dropout 0";
                    let seq = if options.contains("--seq-len") { "" } else { "--seq-len 2048" };
                    let batch = if options.contains("--batch-size") { "" } else { "--batch-size 2" };
                    let pages = if options.contains("--paged-budget") { "" } else { "--paged-budget off" };
                    let advised = peak(&job(&format!("{kept} {seq} {batch} {pages} {options}"), Some(H100))).unwrap();
                    prop_assert!(room.holds(&advised), "{options}");
                }
            }
        }
    }
}

/// An H100 with this much memory for a step.
fn room(bytes: usize) -> Room {
    let name = "NVIDIA H100 80GB HBM3".into();
    Room { chip: Some(H100), name, imagined: true, bytes, host: usize::MAX, of: String::new() }
}

#[test]
fn pages_leave_before_nothing_fits() {
    // All pages resident take 1.9 GiB; besides them a step takes at least 5.9.
    let asked = job(&format!("{QLORA} 4 --rank 64"), Some(H100));
    let room = room(7 << 30);
    let choice = room.fastest(&asked).unwrap().unwrap();
    let pages = choice.job.pages().unwrap().unwrap();
    assert!(pages.resident > 0 && pages.resident < pages.count, "{pages:?}");
    assert!(room.holds(&choice.usage));
    // A budget that was given stays.
    let asked = job(&format!("{QLORA} 4 --rank 64 --paged-budget 0"), Some(H100));
    let choice = room.fastest(&asked).unwrap().unwrap();
    assert_eq!(choice.job.pages().unwrap().unwrap().resident, 0);
}

#[test]
fn weights_are_held_dequantized_where_memory_is_left() {
    let chosen = |options: &str, chip, gib: usize| {
        let room = Room { chip, ..room(gib << 30) };
        let asked = job(&format!("--model random:llama-3.1-8b --dropout 0 --batch-size 1 {options}"), chip);
        room.fastest(&asked).unwrap().unwrap().job.settings
    };
    assert_eq!(chosen("--seq-len 2048", Some(H100), 30).dequantized_layers, 32);
    // Activations first: they save more time for their memory.
    let some = chosen("--seq-len 2048", Some(H100), 16);
    assert!((5..15).contains(&some.dequantized_layers) && some.activations == Activations::default(), "{some:?}");
    assert_eq!(chosen("--seq-len 2048", Some(H100), 11).dequantized_layers, 0);
    // Where no product dequantizes a weight as a whole there is nothing to save.
    let ampere = Some(Chip { capability: (8, 0), sms: 108 });
    for (options, chip) in [
        ("--seq-len 256", Some(H100)),
        ("--seq-len 2048 --dtype f32", Some(H100)),
        ("--seq-len 2048 --method lora", Some(H100)),
        ("--seq-len 2048", ampere),
        ("--seq-len 2048", None),
    ] {
        assert_eq!(chosen(options, chip, 200).dequantized_layers, 0, "{options} {chip:?}");
    }
    // Two bytes a weight, and less time.
    let of = |layers| job(&format!("{QLORA} 1 --dequantized-layers {layers}"), Some(H100));
    let [none, one, all] = [0, 1, 32].map(|layers| peak(&of(layers)).unwrap().peak[Tag::Weights as usize]);
    assert_eq!((one - none, all - none), (436_207_616, 32 * 436_207_616));
    let [none, one, all] = [0, 1, 40].map(|layers| Rates::reference().speed(&of(layers)));
    assert!(none < one && one < all);
}

#[test]
fn what_layers_keep_in_host_memory_is_counted() {
    let job = |options: &str| job(&format!("{QLORA} 4 {options}"), Some(H100));
    // 32 layers of 8,192 tokens: 4,096 columns in bf16, and seven t of 16.
    assert_eq!(on_host(&job("--activations inputs@host")), 32 * 8192 * (2 * 4096 + 2 * 7 * 16));
    assert_eq!(on_host(&job("--activations inputs")), 0);
    // On the device two layers' inputs are left of 32.
    let [device, host] = ["inputs", "inputs@host"].map(|kept| peak(&job(&format!("--activations {kept}"))).unwrap());
    assert_eq!(device.total_peak - host.total_peak, 30 * 8192 * (2 * 4096 + 2 * 7 * 16));
}
