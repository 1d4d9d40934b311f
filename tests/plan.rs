//! Steps take what is planned for them. One test, as memory is counted for the whole process; on the CPU to a few KiB, and on
//! one thread, as every thread has panels of its own.

use clap::Parser;
use nibble::{
    cli::Cli,
    data::Batch,
    model::{Model, Outline},
    plan::{Job, peak},
    settings::Settings,
    step::Stepper,
    train::{attach, source},
};
use nibble_runtime::{
    Device, Tag,
    cuda::{Gpu, device_for_tests},
    memory::{Usage, reset_peak_of, usage_of},
};

/// Ids, labels, the factor of clipping: what the plan leaves out.
const SMALL: usize = 8 << 10;

/// Settings of a run on a device: two sequences of 50 tokens a step, or as `options` say.
fn settings(options: &str, device: Device) -> Settings {
    let device = device.to_string();
    let defaults = [("--model", "random:tiny"), ("--grad-accum", "1"), ("--batch-size", "2"), ("--seq-len", "50")];
    let missing = defaults.iter().filter(|(key, _)| !options.contains(key)).flat_map(|&(key, value)| [key, value]);
    let args = ["train-llama", "--data", "x", "--device", &device].into_iter();
    let args = args.chain(missing).chain(options.split_whitespace());
    Settings::resolve(&Cli::try_parse_from(args).unwrap().train, "").unwrap()
}

fn planned(settings: &Settings, device: Device) -> Usage {
    let chip = Gpu::of(device).ok().map(Gpu::chip);
    peak(&Job::new(&Outline::read(&source(settings)).unwrap(), settings, chip).unwrap()).unwrap()
}

/// The peaks of two steps, less what was held before.
fn measured(settings: &Settings, device: Device) -> Usage {
    let before = usage_of(device).current;
    let mut model = Model::load(&source(settings)).unwrap();
    attach(&mut model, settings).unwrap();
    reset_peak_of(device);
    let ids: Vec<i32> = (0..(settings.batch_size * settings.seq_len) as i32).collect();
    let batch = Batch { labels: ids.clone(), ids, lengths: vec![settings.seq_len; settings.batch_size] };
    let mut stepper = Stepper::new(&model.llama, settings).unwrap();
    for step in 0..2 {
        stepper.step(&mut model.llama, &vec![batch.clone(); settings.grad_accum], step, 1e-3).unwrap();
    }
    let mut usage = usage_of(device);
    usage.peak.iter_mut().zip(before).for_each(|(peak, before)| *peak -= before);
    usage.total_peak -= before.iter().sum::<usize>();
    usage
}

#[test]
fn gpu_steps_take_what_is_planned() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    for options in [
        "",
        "--recompute 1",
        "--recompute --dropout 0 --rank 4",
        "--dropout 0 --targets q_proj,down_proj --batch-size 3 --seq-len 33",
        "--method lora --optimizer-bits 8",
        "--method lora --grad-accum 2 --no-double-quant",
        "--embedding-bits 8 --recompute 3",
        "--dora --dropout 0 --rank 4",
        "--dora --recompute 2 --batch-size 1 --seq-len 20",
        "--method lora --dora --rank-pattern gate_proj=3",
        "--modules-to-save embed_tokens --dropout 0",
        "--modules-to-save lm_head --recompute",
        "--modules-to-save embed_tokens,lm_head --grad-accum 2",
        "--target-pattern .*layers.[02].*proj --rank-pattern q_proj=2",
        "--method full",
        "--method full --recompute --grad-accum 2",
        "--activations attention",
        "--activations inputs@host --dropout 0",
        "--activations attention@host:2,all --dora",
        "--activations all@host:3,inputs --method lora",
        "--activations all@host --method full",
        "--activations inputs@host --feed-forward-rows 33 --dropout 0",
        "--activations attention:2,inputs@host --feed-forward-rows 60 --dropout 0 --paged-budget off",
        "--recompute --feed-forward-rows 7 --method full",
    ] {
        let settings = settings(options, Device::Cpu);
        let (planned, measured) = (planned(&settings, Device::Cpu), measured(&settings, Device::Cpu));
        let close = |found: usize, planned: usize| found <= planned + SMALL && planned <= found + SMALL;
        for ((tag, found), planned) in Tag::ALL.iter().zip(measured.peak).zip(planned.peak) {
            assert!(close(found, planned), "{options}: {tag} {found} bytes, planned {planned}");
        }
        let (found, planned) = (measured.total_peak, planned.total_peak);
        assert!(close(found, planned), "{options}: {found} bytes, planned {planned}");
    }

    let Some(device) = device_for_tests() else { return };
    for options in [
        "",
        "--recompute --dropout 0",
        "--rank 64 --paged-budget off",
        "--method full --recompute 10",
        "--activations attention@host:20,all",
        "--activations inputs@host --feed-forward-rows 512 --dropout 0",
    ] {
        let shape = "--model random:smollm2-135m --batch-size 4 --seq-len 512";
        let settings = settings(&format!("{shape} {options}"), device);
        let (found, planned) =
            (measured(&settings, device).total_peak as f64, planned(&settings, device).total_peak as f64);
        assert!((found / planned - 1.0).abs() <= 0.03, "{options}: {found} bytes, planned {planned}");
    }
}
