//! Checkpoints: all that a run needs to go on as if it had never stopped, to the bit.
//!
//! `checkpoints/step-N` in the run's folder has
//! - `parameters.safetensors`: what trains, f32;
//! - `optimizer.safetensors`: its moments, `<parameter>.<part>`, whether they were in pages or not;
//! - `state.toml`: [`State`];
//! - `SHA256SUMS` of the three, which `sha256sum -c` checks too.
//!
//! Random numbers, the order of the data and the learning rate need nothing: they are functions of settings and step. A
//! checkpoint is written under another name and renamed, so that one of this name is whole.

use crate::{
    best::Evaluations,
    cli::DTypeChoice,
    eval::EvalResult,
    loss_scale::LossScale,
    report::StepMetrics,
    run_dir::RunDir,
    settings::{Settings, as_text},
    step::Stepper,
};
use anyhow::{Context, Result, bail, ensure};
use nibble_models::{
    Llama,
    files::{
        atomic::{atomic_folder, read_text, remove_unfinished},
        safetensors::{SafetensorsFile, write_streamed},
    },
};
use nibble_optim::{Layout, Part};
use nibble_runtime::{DType, Device, Error, ParamId, Tag};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.toml";
const SUMS: &str = "SHA256SUMS";

/// Where a run is, besides the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct State {
    /// Steps done.
    pub step: u32,
    /// Updates that the optimizer counts: f16 steps that overflowed are not among them.
    pub updates: u32,
    /// What the model computes in.
    #[serde(with = "as_text")]
    pub dtype: DTypeChoice,
    pub loss_scale: LossScale,
    /// The evaluation before the first step.
    pub before: Option<EvalResult>,
    /// The last step, if its evaluation was interrupted and it is not in `metrics.jsonl` yet.
    pub unreported: Option<StepMetrics>,
    pub evaluations: Evaluations,
    pub origin: Origin,
    pub settings: Settings,
}

/// Digests of what a run is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Origin {
    pub model: String,
    /// Settings of the adapter; empty for full fine-tuning.
    pub adapter: String,
    pub data: String,
    pub eval_data: String,
}

impl Origin {
    /// Refuses to go on from a checkpoint of a run that was made from `other`.
    ///
    /// # Errors
    /// The two differ; the error names what does.
    pub fn refuse_other(&self, other: &Origin) -> Result<()> {
        let pairs = [
            ("the model", &self.model, &other.model),
            ("the adapter's settings", &self.adapter, &other.adapter),
            ("the training data", &self.data, &other.data),
            ("the evaluation data", &self.eval_data, &other.eval_data),
        ];
        let changed: Vec<&str> = pairs.iter().filter(|(_, now, then)| now != then).map(|(what, ..)| *what).collect();
        ensure!(
            changed.is_empty(),
            "a run cannot be continued with other inputs: {} changed since the checkpoint. Put back what was there, or \
             start a new run",
            changed.join(" and ")
        );
        Ok(())
    }
}

/// A whole checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    pub state: State,
}

impl Checkpoint {
    /// The newest whole checkpoint of a run, if there is one. Says on standard error which ones are damaged.
    ///
    /// # Errors
    /// The folder cannot be read, or its newest whole checkpoint is of another version of this program.
    pub fn latest(run: &RunDir) -> Result<Option<Checkpoint>> {
        for (step, folder) in found(&folder_of(run))?.into_iter().rev() {
            if let Err(damage) = verify(&folder) {
                eprintln!("warning: the checkpoint of step {step} is damaged and left out: {damage:#}");
                continue;
            }
            let path = folder.join(STATE);
            let state = toml::from_str(&read_text(&path)?)
                .with_context(|| format!("{} is of another version of this program", path.display()))?;
            return Ok(Some(Checkpoint { folder, state }));
        }
        Ok(None)
    }

    /// Overwrites the trainable parameters of `llama`.
    ///
    /// # Errors
    /// They are others than the saved ones.
    pub fn load_parameters(&self, llama: &mut Llama) -> Result<()> {
        let file = SafetensorsFile::open(&self.folder.join(PARAMETERS))?;
        let device = llama.device();
        let names: Vec<String> = llama.parameters().into_iter().map(|(_, name, _)| name).collect();
        let (expected, path) = (names.len(), file.path().display());
        ensure!(file.names().len() == expected, "{path}: {} parameters; expected {expected}", file.names().len());
        for ((_, value), name) in llama.parameters_mut().into_iter().zip(&names) {
            let saved = file.tensor_on(name, device, Tag::Workspace)?;
            ensure!(saved.shape() == value.shape(), "{path}: {name} is {saved:?}; expected {:?}", value.shape());
            value.copy_from(0, &saved)?;
        }
        Ok(())
    }

    /// Restores what `stepper` keeps for the parameters of `llama`.
    ///
    /// # Errors
    /// It is for others than the saved ones.
    pub fn load_optimizer(&self, llama: &Llama, stepper: &mut Stepper) -> Result<()> {
        stepper.set_scaling(self.state.loss_scale);
        let file = SafetensorsFile::open(&self.folder.join(OPTIMIZER))?;
        let parameters = llama.parameters();
        let moments =
            parameters.iter().flat_map(|(id, name, _)| Part::ALL.map(|part| (moment(name, part), (*id, part))));
        let moments: BTreeMap<String, (ParamId, Part)> = moments.collect();
        let names = file.names();
        let mut layout = Vec::with_capacity(names.len());
        for name in &names {
            let view = file.view(name)?;
            let (Some(&(id, part)), Some(dtype)) = (moments.get(name), view.dtype()) else {
                bail!("{}: unexpected tensor {name}", file.path().display());
            };
            layout.push(Layout { id, part, dtype, shape: view.shape.to_vec() });
        }
        // State that is not in pages is used where the parameters are; pages are filled from host memory.
        let device = if stepper.paging().is_some() { Device::Cpu } else { llama.device() };
        let state = names.iter().zip(&layout).map(|(name, Layout { id, part, .. })| {
            let tensor = file.tensor_on(name, device, Tag::Optimizer);
            Ok((*id, *part, tensor.map_err(|error| Error::invalid("checkpoint", error.to_string()))?))
        });
        stepper.optimizer_mut().restore_streamed(self.state.updates, &layout, state)?;
        Ok(())
    }
}

/// Makes the checkpoints of a run.
pub struct Saver {
    folder: PathBuf,
    run: PathBuf,
    every: Option<u32>,
    interval: Option<Duration>,
    keep: usize,
    /// When the last one was made, or the run began.
    last: Instant,
    /// Step of the last one.
    saved: Option<u32>,
}

impl Saver {
    /// For a run that goes on from the checkpoint of step `saved`, or begins.
    pub fn new(run: &RunDir, settings: &Settings, saved: Option<u32>) -> Saver {
        Saver {
            folder: folder_of(run),
            run: run.path().to_path_buf(),
            every: settings.save_every,
            interval: (settings.save_minutes > 0.0).then(|| Duration::from_secs_f64(60.0 * settings.save_minutes)),
            keep: settings.keep,
            last: Instant::now(),
            saved,
        }
    }

    /// Whether a checkpoint is to be made after `step`.
    pub fn due(&self, step: u32) -> bool {
        self.every.is_some_and(|every| step.is_multiple_of(every))
            || self.interval.is_some_and(|interval| self.last.elapsed() >= interval)
    }

    /// Removes what a process that was killed has left half-written in the run's folder. None may be writing there.
    pub fn clear(&self) -> Result<()> {
        remove_unfinished(&self.run)?;
        if self.folder.exists() {
            remove_unfinished(&self.folder)?;
        }
        Ok(())
    }

    /// Makes the checkpoint of `state`, unless there is one of its step, and removes those that are not to be kept. What
    /// `stepper` knows is put into `state`.
    ///
    /// # Errors
    /// It cannot be written; those that there were are as before then.
    pub fn save(&mut self, state: &mut State, llama: &Llama, stepper: &Stepper) -> Result<()> {
        if self.saved == Some(state.step) {
            return Ok(());
        }
        (state.updates, state.loss_scale) = (stepper.optimizer().steps_done(), stepper.scaling());
        let path = self.folder.join(format!("step-{}", state.step));
        atomic_folder(&path, |folder| write(folder, state, llama, stepper))
            .with_context(|| format!("writing the checkpoint {}", path.display()))?;
        (self.last, self.saved) = (Instant::now(), Some(state.step));
        // Those of later steps were damaged, or this run would have gone on from them.
        let found = found(&self.folder)?;
        let first_kept = found.range(..=state.step).rev().map(|(step, _)| *step).take(self.keep).last();
        for (step, folder) in found {
            if step > state.step || first_kept.is_some_and(|first| step < first) {
                remove(&folder).with_context(|| format!("removing the checkpoint {}", folder.display()))?;
            }
        }
        Ok(())
    }

    /// What a user whose run could not go on after `step` is to know.
    pub fn advice(&self, step: u32) -> String {
        let run = self.run.display();
        match self.saved {
            Some(saved) => format!(
                "stopped at step {step}; the checkpoint of step {saved} is whole: once the cause is gone, --resume {run} \
                 continues from there"
            ),
            None => format!("stopped at step {step}, before the first checkpoint of {run}"),
        }
    }
}

/// The folder of a run's checkpoints.
fn folder_of(run: &RunDir) -> PathBuf {
    run.join("checkpoints")
}

/// The checkpoints in a folder, by step; none if there is no folder.
fn found(folder: &Path) -> Result<BTreeMap<u32, PathBuf>> {
    let mut found = BTreeMap::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries.with_context(|| format!("reading {}", folder.display()))?,
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
        let name = entry.file_name();
        if let Some(step) = name.to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok()) {
            found.insert(step, entry.path());
        }
    }
    Ok(found)
}

/// Removes a checkpoint. Under its name it is whole until it is gone.
fn remove(folder: &Path) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".removed-");
    name.push(folder.file_name().unwrap_or_default());
    let away = folder.with_file_name(name);
    fs::rename(folder, &away)?;
    fs::remove_dir_all(away)
}

fn moment(parameter: &str, part: Part) -> String {
    format!("{parameter}.{part}")
}

/// Writes the files of a checkpoint. One tensor is in host memory at a time, besides those that are there anyway.
fn write(folder: &Path, state: &State, llama: &Llama, stepper: &Stepper) -> Result<()> {
    let mut sums = String::new();
    let mut file = |name: &str, write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>| {
        let sum = summed(&folder.join(name), write).with_context(|| name.to_string())?;
        sums += &format!("{sum}  {name}\n");
        anyhow::Ok(())
    };
    let parameters = llama.parameters();
    let layout: Vec<(String, DType, Vec<usize>)> =
        parameters.iter().map(|(_, name, value)| (name.clone(), value.dtype(), value.shape().to_vec())).collect();
    file(PARAMETERS, &mut |out| {
        write_streamed(out, &layout, parameters.iter().map(|(.., value)| Ok((*value).clone())))
    })?;

    let names: BTreeMap<ParamId, &String> = parameters.iter().map(|(id, name, _)| (*id, name)).collect();
    let optimizer = stepper.optimizer();
    let layout: Vec<(String, DType, Vec<usize>)> = optimizer
        .layout()
        .into_iter()
        .map(|Layout { id, part, dtype, shape }| {
            let name =
                names.get(&id).with_context(|| format!("the optimizer's parameter {} is not the model's", id.0))?;
            Ok((moment(name, part), dtype, shape))
        })
        .collect::<Result<_>>()?;
    file(OPTIMIZER, &mut |out| {
        let moments = optimizer.state().map_err(io::Error::other)?;
        write_streamed(out, &layout, moments.map(|saved| saved.map(|(.., tensor)| tensor).map_err(io::Error::other)))
    })?;
    let text = toml::to_string(state).context("writing the state")?;
    file(STATE, &mut |out| out.write_all(text.as_bytes()))?;
    summed(&folder.join(SUMS), &mut |out| out.write_all(sums.as_bytes())).context(SUMS)?;
    Ok(())
}

/// Bytes on their way to a file, and their sum so far.
struct Summing<W> {
    out: W,
    sum: Sha256,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.sum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes and syncs a new file; its SHA-256.
fn summed(path: &Path, write: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>) -> io::Result<String> {
    let file = File::create_new(path)?;
    let mut out = Summing { out: BufWriter::with_capacity(1 << 20, &file), sum: Sha256::new() };
    write(&mut out)?;
    out.flush()?;
    file.sync_all()?;
    Ok(format!("{:x}", out.sum.finalize()))
}

/// Whether the files of a checkpoint are as they were written.
fn verify(folder: &Path) -> Result<()> {
    let path = folder.join(SUMS);
    let text = read_text(&path)?;
    let sums: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.split_once("  ")).map(|(sum, name)| (name, sum)).collect();
    for name in [PARAMETERS, OPTIMIZER, STATE] {
        let expected = sums.get(name).with_context(|| format!("{} has no {name}", path.display()))?;
        let path = folder.join(name);
        let found = sum(&path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(found == *expected, "{} is not what {SUMS} says", path.display());
    }
    Ok(())
}

/// The SHA-256 of a file.
fn sum(path: &Path) -> io::Result<String> {
    let (mut file, mut sum, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("{:x}", sum.finalize())),
            read => sum.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::Model,
        settings::Method,
        train::{attach, source},
    };
    use nibble_runtime::Tensor;

    /// A model with an adapter of `rank`, and what trains it, in f16.
    fn start(rank: usize) -> (Model, Stepper, Settings) {
        let settings = Settings {
            model: Some("random:tiny".into()),
            method: Method::Lora,
            rank,
            dtype: DTypeChoice(Some(DType::F16)),
            device: nibble_runtime::DeviceRequest::Exactly(Device::Cpu),
            ..Settings::default()
        };
        let mut model = Model::load(&source(&settings)).unwrap();
        attach(&mut model, &settings).unwrap();
        let stepper = Stepper::new(&model.llama, &settings).unwrap();
        (model, stepper, settings)
    }

    #[test]
    fn what_is_saved_comes_back_and_only_the_newest_are_kept() {
        let place = tempfile::tempdir().unwrap();
        let (model, mut stepper, settings) = start(4);
        let run = RunDir::plan(&Settings { out: Some(place.path().into()), ..settings.clone() }).unwrap();
        assert!(Checkpoint::latest(&run).unwrap().is_none());
        let mut scaling = LossScale::new(DType::F16);
        for finite in [true, false, true, true] {
            scaling.update(finite);
        }
        stepper.set_scaling(scaling);
        let mut evaluations = Evaluations::default();
        evaluations.record(7, 0.1 + 0.2);
        let metrics = r#"{"step":9,"loss":0.30000000000000004,"grad_norm":null,"lr":1e-5,"tokens":3,"tok_s":0.1}"#;
        let mut state = State {
            step: 0,
            updates: 0,
            dtype: settings.dtype,
            loss_scale: LossScale::new(DType::F32),
            before: None,
            unreported: Some(serde_json::from_str(metrics).unwrap()),
            evaluations,
            origin: Origin { model: "m".into(), adapter: String::new(), data: "d".into(), eval_data: String::new() },
            settings: settings.clone(),
        };
        let mut saver = Saver::new(&run, &settings, None);
        for step in [7, 8, 9] {
            state.step = step;
            saver.save(&mut state, &model.llama, &stepper).unwrap();
        }
        assert_eq!(found(&folder_of(&run)).unwrap().into_keys().collect::<Vec<_>>(), [8, 9]);
        let saved = Checkpoint::latest(&run).unwrap().unwrap();
        assert_eq!((&saved.state, saved.state.loss_scale), (&state, scaling));

        let (mut other, mut restored, _) = start(4);
        other.llama.parameters_mut().into_iter().for_each(|(_, value)| {
            *value = Tensor::zeros(value.shape(), DType::F32, Device::Cpu, Tag::Adapters).unwrap();
        });
        saved.load_parameters(&mut other.llama).unwrap();
        saved.load_optimizer(&other.llama, &mut restored).unwrap();
        let bytes = |model: &Model| -> Vec<Vec<u8>> {
            model.llama.parameters().iter().map(|(.., value)| value.bytes().unwrap().to_vec()).collect()
        };
        assert!(bytes(&other) == bytes(&model));
        assert_eq!(restored.scaling(), scaling);
        let (mut wider, ..) = start(8);
        assert!(saved.load_parameters(&mut wider.llama).is_err());

        // A run that went on from step 8 because that of step 9 was damaged ends up without it.
        let mut saver = Saver::new(&run, &settings, Some(7));
        state.step = 8;
        saver.save(&mut state, &model.llama, &stepper).unwrap();
        assert_eq!(found(&folder_of(&run)).unwrap().into_keys().collect::<Vec<_>>(), [8]);
    }
}
