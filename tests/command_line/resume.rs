//! Runs that stop and go on: however they were stopped, what they leave is that of a run that never was.

use crate::support::{Place, edit_json, golden};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// Everything that the random streams, the order of the data and the schedule go into.
const USUAL: [&str; 18] = [
    "--batch-size",
    "3",
    "--grad-accum",
    "2",
    "--dropout",
    "0.2",
    "--schedule",
    "cosine",
    "--warmup",
    "3",
    "--eval-data",
    "ids.jsonl",
    "--eval-every",
    "4",
    "--save-every",
    "3",
    "--keep",
    "3",
];

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// What a run leaves, without its times.
fn left_by(place: &Place) -> BTreeMap<String, Vec<u8>> {
    let mut left = BTreeMap::new();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        for folder in ["adapter", "best"] {
            let name = format!("run/{folder}/{file}");
            if place.path(&name).exists() {
                left.insert(name.clone(), place.bytes(&name));
            }
        }
    }
    left.insert("loss.svg".into(), place.bytes("run/loss.svg"));
    let timeless = |mut value: Value, time: &str| {
        assert!(value.as_object_mut().unwrap().remove(time).is_some());
        value.to_string()
    };
    let metrics = place.metrics("run").into_iter().map(|line| timeless(line, "tok_s") + "\n");
    left.insert("metrics".into(), metrics.collect::<String>().into_bytes());
    let summary: Value = serde_json::from_slice(&place.bytes("run/summary.json")).unwrap();
    left.insert("summary".into(), timeless(summary, "seconds").into_bytes());
    left
}

#[track_caller]
fn assert_same(place: &Place, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let left = left_by(place);
    let names = |files: &BTreeMap<String, _>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(expected), "{what}");
    for (name, bytes) in expected {
        assert!(&left[name] == bytes, "{what}: {name} is not that of a run that was never stopped");
    }
    for path in place.contents().keys() {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(!name.starts_with('.'), "{what}: {} was left behind", path.display());
    }
}

/// A run that nothing stops.
fn whole(args: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let place = Place::new();
    place.train("run", args);
    left_by(&place)
}

fn start(place: &Place, args: &[&str]) -> Child {
    place.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    // It may be gone already.
    let _ = Command::new("kill").args([name, &child.id().to_string()]).stderr(Stdio::null()).status().unwrap();
}

/// Stops the run that `args` start with a signal as soon as `when` holds; what it said.
#[track_caller]
fn stop(place: &Place, args: &[&str], name: &str, when: impl Fn() -> bool) -> String {
    let mut child = start(place, args);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !when() {
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline, "the run was not to be stopped");
        sleep(Duration::from_millis(2));
    }
    signal(&child, name);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let code = if name == "-KILL" { None } else { Some(130) };
    assert_eq!(output.status.code(), code, "{stderr}");
    stderr
}

/// A run of `args` that was killed after its third checkpoint.
fn killed(place: &Place, args: &[&str]) {
    let args = place.train_args("run", args);
    stop(place, &strs(&args), "-KILL", || place.path("run/checkpoints/step-9").exists());
    assert!(!place.path("run/summary.json").exists());
}

/// The checkpoints of a run, by step.
fn checkpoints(place: &Place) -> Vec<u32> {
    let entries = fs::read_dir(place.path("run/checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut steps: Vec<u32> = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect();
    steps.sort_unstable();
    steps
}

#[test]
fn a_run_goes_on_after_every_signal() {
    let args = [&USUAL[..], &["--steps", "150"]].concat();
    let expected = whole(&args);
    for name in ["-INT", "-TERM", "-KILL"] {
        let place = Place::new();
        let said = stop(&place, &strs(&place.train_args("run", &args)), name, || {
            place.path("run/checkpoints/step-9").exists()
        });
        if name != "-KILL" {
            assert!(said.contains("--resume run"), "{said}");
            // It is at the last step, wherever that was.
            let (steps, saved) = (place.metrics("run").len() as u32, checkpoints(&place));
            assert_eq!(saved.last(), Some(&steps), "{said}");
            assert_eq!(saved.len(), 3);
        }
        let said = place.ok(&["--resume", "run"]).stderr;
        assert!(said.contains("resume   run from the checkpoint of step"), "{said}");
        assert_same(&place, &expected, name);
        let before = place.contents();
        let said = place.ok(&["train", "--resume", "run"]).stderr;
        assert!(said.contains("run is finished, after 150 steps"), "{said}");
        assert!(place.contents() == before);
    }
}

/// Numbers that look random, other ones in each run of the tests.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        Dice(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A few kills at any moment, or as many as `NIBBLE_KILLS` says.
#[test]
fn a_run_goes_on_after_kills_at_random_moments() {
    let kills: u32 = std::env::var("NIBBLE_KILLS").map_or(12, |kills| kills.parse().unwrap());
    let kinds: [&[&str]; 5] = [
        &[],
        &["--dtype", "f16", "--optimizer-bits", "8", "--rank", "16"],
        &["--rank", "64", "--paged-budget", "0", "--page-size", "256KiB"],
        &["--method", "lora", "--eval-every", "1", "--save-every", "1", "--keep", "1"],
        &["--lr", "0.05", "--max-grad-norm", "0", "--eval-every", "2", "--patience", "2"],
    ];
    let (mut dice, mut done) = (Dice::new(), 0);
    let mut expected = BTreeMap::new();
    for kind in (0..kinds.len()).cycle() {
        if done >= kills {
            break;
        }
        let usual = USUAL.chunks(2).filter(|option| !kinds[kind].contains(&option[0])).flatten().copied();
        let args: Vec<&str> = usual.chain(["--steps", "30"]).chain(kinds[kind].iter().copied()).collect();
        let (expected, took) = expected.entry(kind).or_insert_with(|| {
            let clock = Instant::now();
            (whole(&args), clock.elapsed().as_millis() as u64)
        });
        let place = Place::new();
        let train = place.train_args("run", &args);
        loop {
            let resume = place.path("run/settings.toml").exists();
            let mut child = start(&place, &if resume { vec!["--resume", "run"] } else { strs(&train) });
            sleep(Duration::from_millis(dice.below(*took)));
            if child.try_wait().unwrap().is_none() {
                // Mostly without a warning.
                signal(&child, ["-KILL", "-KILL", "-KILL", "-INT", "-TERM"][dice.below(5) as usize]);
                done += 1;
            }
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(matches!(output.status.code(), None | Some(0 | 130)), "{said}");
            assert!(!said.contains("damaged") && !said.contains("warning"), "{said}");
            if output.status.code() == Some(0) {
                break;
            }
        }
        assert_same(&place, expected, &format!("after {done} kills, {args:?}"));
    }
    eprintln!("{done} kills");
}

/// Damages the bytes of a file.
type Spoil = fn(&mut Vec<u8>);

/// Where a checkpoint is damaged, the one before is taken.
#[test]
fn damaged_checkpoints_are_left_out() {
    let args = [&USUAL[..], &["--steps", "60"]].concat();
    let expected = whole(&args);
    let origin = Place::new();
    killed(&origin, &args);
    let steps = checkpoints(&origin);
    let (newest, before) = (steps[steps.len() - 1], steps[steps.len() - 2]);
    let damage: [(&str, Spoil); 5] = [
        ("parameters.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("optimizer.safetensors", |bytes| bytes.truncate(bytes.len() / 2)),
        ("optimizer.safetensors", Vec::clear),
        ("state.toml", |bytes| bytes[7] ^= 1),
        ("SHA256SUMS", |bytes| bytes[3] = b'x'),
    ];
    let file = |step: u32, name: &str| format!("run/checkpoints/step-{step}/{name}");
    let spoil = |place: &Place, step, name: &str, spoil: Spoil| {
        let mut bytes = place.bytes(&file(step, name));
        spoil(&mut bytes);
        place.write(&file(step, name), bytes);
    };
    for (name, how) in damage {
        let place = origin.copy_of();
        spoil(&place, newest, name, how);
        let said = place.ok(&["--resume", "run"]).stderr;
        assert!(said.contains(&format!("the checkpoint of step {newest} is damaged")) && said.contains(name), "{said}");
        assert!(said.contains(&format!("from the checkpoint of step {before}")), "{said}");
        assert_same(&place, &expected, name);
    }
    // Or none, if none is whole.
    let place = origin.copy_of();
    for step in &steps {
        fs::remove_file(place.path(&file(*step, "state.toml"))).unwrap();
    }
    let said = place.ok(&["--resume", "run"]).stderr;
    assert!(said.contains("from the beginning: it has no whole checkpoint"), "{said}");
    assert_same(&place, &expected, "none whole");
    assert_eq!(checkpoints(&place), [54, 57, 60]);
}

#[test]
fn what_changes_results_cannot_change_in_a_run() {
    let args = [&USUAL[..], &["--steps", "60", "--device", "cpu"]].concat();
    let expected = whole(&args);
    let place = Place::new();
    killed(&place, &args);
    place.refuses(&["--resume", "run", "--lr", "0.5"], &["lr is 0.5 and was 0.001"]);
    place.refuses(&["--resume", "run", "--epochs", "2"], &["epochs"]);
    place.refuses(&["--resume", "run", "--optimizer-bits", "8"], &["optimizer-bits is \"8\" and was \"32\""]);
    place.refuses(&["--resume", "run", "--no-shuffle", "--rank", "8"], &["no-shuffle", "rank is 8 and was 4"]);
    place.refuses(&["--resume", "run", "--out", "other"], &["--resume", "--out"]);
    place.refuses(&["--resume", "run", "--keep", "0"], &["--keep"]);
    place.refuses(&["--resume", "other"], &["other holds no run"]);
    place.refuses(&["--resume"], &["no run under runs/"]);
    // Nor behind its back.
    let edit = |name: &str, from: &str, to: &str| {
        let text = place.read(name);
        assert!(text.contains(from));
        place.write(name, text.replacen(from, to, 1));
        text
    };
    let text = edit("run/settings.toml", "seed = 0", "seed = 1");
    place.refuses(&["--resume", "run"], &["seed is 1 and was 0"]);
    place.write("run/settings.toml", text);
    let text = edit("ids.jsonl", "[3,", "[4,");
    place.refuses(&["--resume", "run"], &["the training data and the evaluation data changed"]);
    place.write("ids.jsonl", text);
    // The rest may.
    let free = ["--keep", "1", "--save-every", "7", "--recompute", "2", "--device", "cpu", "--paged-budget", "auto"];
    place.ok(&[&["--resume", "run", "--page-size", "256KiB"], &free[..]].concat());
    assert_same(&place, &expected, "other free settings");
    assert_eq!(checkpoints(&place), [56]);
}

/// A model of another kind than the checkpoint's is not trained on.
#[test]
fn another_model_is_refused() {
    let place = Place::new();
    let model = place.copy("model", "m");
    killed(&place, &[&USUAL[..], &["--steps", "60", "--model", "m"]].concat());
    edit_json(&model.join("config.json"), |config| config["rms_norm_eps"] = 1e-3.into());
    place.refuses(&["--resume", "run"], &["the model changed"]);
}

/// Pages hold the same state as tensors do.
#[test]
fn pages_come_and_go() {
    let args = [&USUAL[..], &["--steps", "60", "--rank", "64"]].concat();
    for bits in ["32", "8"] {
        let args = [&args[..], &["--optimizer-bits", bits]].concat();
        let expected = whole(&args);
        let pages = ["--paged-budget", "0", "--page-size", "256KiB"];
        for (before, after) in [(&pages[..], &["--paged-budget", "off"][..]), (&["--paged-budget", "off"], &pages)] {
            let place = Place::new();
            killed(&place, &[&args[..], before].concat());
            let said = place.ok(&[&["--resume", "run"], after].concat()).stderr;
            assert_eq!(said.lines().any(|line| line.starts_with("pages ")), after.len() > 2, "{said}");
            assert_same(&place, &expected, &format!("{bits} bits, {before:?} then {after:?}"));
        }
    }
}

/// Full fine-tuning goes on too, in the type that it began in.
#[test]
fn a_whole_model_goes_on() {
    let args = ["--method", "full", "--dtype", "bf16", "--save-every", "2", "--steps", "40"];
    let expected = Place::new();
    expected.train("run", &args);
    let place = Place::new();
    stop(&place, &strs(&place.train_args("run", &args)), "-KILL", || place.path("run/checkpoints/step-4").exists());
    place.ok(&["--resume", "run"]);
    assert!(place.bytes("run/model/model.safetensors") == expected.bytes("run/model/model.safetensors"));
}

/// A checkpoint that does not fit on the disk stops the run with the ones before it as they were.
#[test]
fn a_full_disk_costs_nothing() {
    let args = [&USUAL[..], &["--steps", "60"]].concat();
    let expected = whole(&args);
    let place = Place::new();
    killed(&place, &args);
    let limited = |blocks: u32| {
        let program = place.command(&[]).get_program().to_str().unwrap().to_string();
        // Without the signal, a write beyond the limit is an error as one to a full disk is.
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec '{program}' --resume run");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).current_dir(place.path("")).env("RAYON_NUM_THREADS", "2");
        let output = shell.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    // Less than the parameters, less than the moments, less than the metrics.
    for blocks in [64, 128, 1] {
        let before = checkpoints(&place);
        let (code, said) = limited(blocks);
        assert_eq!(code, Some(1), "{said}");
        let error = said.lines().find(|line| line.starts_with("error: ")).unwrap();
        for word in ["File too large", "the checkpoint of step", "--resume run"] {
            assert!(error.contains(word), "no {word:?} in {error}");
        }
        assert_eq!(checkpoints(&place), before);
    }
    place.ok(&["--resume", "run"]);
    assert_same(&place, &expected, "after a full disk");
}

/// An evaluation that is interrupted is made when the run goes on.
#[test]
fn an_interrupted_evaluation_is_made_up_for() {
    // Most of the time goes into evaluations.
    let rows: String = (0..800).map(|i| format!("{{\"input_ids\": {:?}}}\n", [3 + i % 500; 24])).collect();
    let args = ["--steps", "4", "--eval-data", "rows.jsonl", "--eval-every", "1", "--lr", "1e-2"];
    let expected = Place::new();
    expected.write("rows.jsonl", &rows);
    expected.train("run", &args);
    let expected = left_by(&expected);
    let mut pending = false;
    for _ in 0..10 {
        let place = Place::new();
        place.write("rows.jsonl", &rows);
        let lines = || fs::read_to_string(place.path("run/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 1);
        stop(&place, &strs(&place.train_args("run", &args)), "-INT", lines);
        let last = *checkpoints(&place).last().unwrap();
        pending |= place.read(&format!("run/checkpoints/step-{last}/state.toml")).contains("[unreported]");
        place.ok(&["--resume", "run"]);
        assert_same(&place, &expected, "after an interrupted evaluation");
        if pending {
            return;
        }
    }
    panic!("no evaluation was interrupted");
}

#[test]
fn the_best_is_kept_and_hopeless_runs_end() {
    let place = Place::new();
    let args =
        ["--lr", "0.05", "--max-grad-norm", "0", "--eval-data", "ids.jsonl", "--eval-every", "2", "--patience", "3"];
    let said = place.train("run", &[&args[..], &["--steps", "200"]].concat()).stderr;
    let metrics = place.metrics("run");
    let evaluated: Vec<(u64, f64)> =
        metrics.iter().filter_map(|line| Some((line["step"].as_u64()?, line["eval_nll"].as_f64()?))).collect();
    assert!(evaluated.iter().enumerate().all(|(i, (step, _))| *step == 2 * (i as u64 + 1)), "{evaluated:?}");
    let (best, nll) = *evaluated.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(metrics.len() as u64, best + 2 * 3, "{said}");
    assert!(metrics.len() < 200 && said.contains("training ends here"), "{said}");
    let summary: Value = serde_json::from_slice(&place.bytes("run/summary.json")).unwrap();
    assert_eq!((summary["best"]["step"].as_u64(), summary["interrupted"].as_bool()), (Some(best), Some(false)));
    let model = golden("model");
    let eval = ["eval", "--model", model.to_str().unwrap(), "--adapter", "run/best", "--data", "ids.jsonl", "--json"];
    let found: Value = serde_json::from_str(&place.ok(&eval).stdout).unwrap();
    assert!((found["nll"].as_f64().unwrap() - nll).abs() < 1e-9, "{found} and {nll}");
    place.refuses_training(&["--patience", "2"], &["--patience needs --eval-every"]);
    place.refuses_training(&["--eval-every", "2"], &["--eval-every needs --eval-data"]);
    place.refuses_training(&["--save-every", "0"], &["--save-every"]);
}

/// Minutes count too, and the run that was written to last is found.
#[test]
fn checkpoints_come_with_time_and_the_latest_run_is_found() {
    let place = Place::new();
    let args = place.train_args("runs/a", &["--save-minutes", "0.0001", "--steps", "3", "--batch-size", "4"]);
    place.ok(&strs(&args));
    assert!(fs::read_dir(place.path("runs/a/checkpoints")).unwrap().count() > 0);
    let args = place.train_args("runs/b", &["--save-minutes", "0", "--steps", "3", "--batch-size", "4"]);
    place.ok(&strs(&args));
    assert!(!place.path("runs/b/checkpoints").exists());
    assert!(place.ok(&["--resume"]).stderr.contains("runs/b is finished"));
}
