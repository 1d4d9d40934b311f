use super::{Job, memory::peak, time::Rates};
use crate::{model::Outline, settings::Settings};
use nibble_models::LlamaConfig;
use nibble_runtime::{DType, Tag, cuda::Chip};

const H100: Chip = Chip { capability: (9, 0), sms: 132 };
const GIB: f64 = (1u64 << 30) as f64;

fn job(args: &[&str], chip: Option<Chip>) -> Job {
    use clap::Parser;
    let cli =
        crate::cli::Cli::try_parse_from([&["train-llama", "--data", "x", "--grad-accum", "1"], args].concat()).unwrap();
    let settings = Settings::resolve(&cli.train, "").unwrap();
    let name = settings.model.clone().unwrap();
    let config = LlamaConfig::shape(name.to_str().unwrap().strip_prefix("random:").unwrap()).unwrap();
    Job::new(&Outline { config, stored: DType::BF16, quantized: None }, &settings, chip)
}

#[test]
fn show() {
    let s8 = "--model random:llama-3.1-8b --dropout 0";
    for (line, total, tok) in [
        ("--batch-size 4 --seq-len 2048 --recompute", 8.4, 11184.),
        ("--batch-size 4 --seq-len 2048", 28.9, 14573.),
        ("--batch-size 1 --seq-len 2048 --recompute", 6.0, 9698.),
        ("--batch-size 1 --seq-len 2048", 11.1, 12418.),
        ("--batch-size 4 --seq-len 2048 --recompute --paged-budget off", 8.3, 11226.),
        ("--batch-size 4 --seq-len 2048 --recompute --paged-budget 0", 8.0, 11032.),
        ("--batch-size 8 --seq-len 2048 --recompute", 11.7, 11576.),
        ("--batch-size 1 --seq-len 8192 --recompute", 8.5, 8764.),
        ("--batch-size 1 --seq-len 16384 --recompute", 11.7, 6929.),
        ("--batch-size 1 --seq-len 32768 --recompute", 18.1, 4792.),
        ("--batch-size 4 --seq-len 2048 --recompute --rank 64 --paged-budget off", 10.2, 10423.),
        ("--batch-size 4 --seq-len 2048 --recompute --rank 64 --paged-budget 480MiB", 9.5, 10231.),
        ("--batch-size 4 --seq-len 2048 --recompute --rank 64", 10.8, 10370.),
        ("--batch-size 4 --seq-len 2048 --recompute --rank 64 --paged-budget 0", 9.0, 9972.),
        (
            "--model random:llama-3.2-1b --method full --batch-size 4 --seq-len 2048 --recompute --paged-budget off",
            24.1,
            6094.,
        ),
        (
            "--model random:llama-3.2-1b --method full --batch-size 4 --seq-len 2048 --recompute --paged-budget 1GiB",
            13.5,
            4852.,
        ),
        (
            "--model random:llama-3.2-1b --method full --batch-size 4 --seq-len 2048 --recompute --paged-budget 1GiB --optimizer-bits 8",
            13.2,
            5546.,
        ),
    ] {
        let line = if line.contains("--model") { line.to_string() } else { format!("{s8} {line}") };
        let job = job(&line.split(' ').collect::<Vec<_>>(), Some(H100));
        let u = peak(&job).unwrap();
        let rates = if line.contains("rank 64") || line.contains("full") {
            Rates::h100_before(false)
        } else {
            Rates::h100_before(true)
        };
        let tags: Vec<_> =
            Tag::ALL.iter().zip(u.peak).map(|(t, b)| format!("{t} {}", nibble_runtime::memory::readable(b))).collect();
        let found = job.tokens() as f64 / rates.seconds(&job);
        println!(
            "{line}\n   {:.3} against {total}: {:+.1} %; {found:.0} against {tok}: {:+.1} %   now {:.0}\n   {}",
            u.total_peak as f64 / GIB,
            100. * (u.total_peak as f64 / GIB / total - 1.),
            100. * (found / tok - 1.),
            job.tokens() as f64 / Rates::reference().seconds(&job),
            tags.join(", ")
        );
    }
}
