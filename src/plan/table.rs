//! `plan`: what a step takes by what layers keep, and steps of other shapes, as a table or as JSON.

use super::{
    Job, SMALLER, job,
    memory::{on_host, peak},
    room::{Choice, Room, cheaper, keeping, least, remedy},
};
use crate::{
    cli::PlanArgs,
    commands::print,
    default_task,
    paging::{Bytes, PagedBudget},
    report::{self, bytes},
    settings::{MemoryBudget, Method, Settings, TrainArgs, as_text},
};
use anyhow::Result;
use nibble_models::llama::Activations;
use nibble_runtime::{DType, Tag, memory::Usage};
use serde::Serialize;
use std::{cmp::Reverse, fmt};

/// Prints the plan of a step.
///
/// # Errors
/// The model cannot be read, or a setting makes no sense.
pub fn plan_command(args: &PlanArgs) -> Result<()> {
    let plan = Plan::new(args)?;
    print(&if args.train.json { serde_json::to_string(&plan)? + "\n" } else { plan.to_string() })
}

/// A plan: bytes and tokens a second.
#[derive(Serialize)]
struct Plan {
    /// The GPU's name, or cpu.
    device: String,
    /// Whether it is here.
    present: bool,
    /// What a step may take,
    memory: usize,
    /// and of what.
    #[serde(skip)]
    of: String,
    model: Shape,
    /// Numbers that train, and how.
    trained: usize,
    method: Method,
    /// Of a micro-batch, as it was asked for.
    batch_size: usize,
    seq_len: usize,
    /// By what layers keep.
    choices: Vec<Row>,
    /// Other shapes, each at its fastest that fits.
    shapes: Vec<Row>,
    /// `None` if nothing fits;
    fastest: Option<Row>,
    /// options with which something would, if there are any.
    remedy: Option<String>,
    /// Where tokens a second come from; `None` where they are not known.
    rates: Option<&'static str>,
}

/// The model.
#[derive(Serialize)]
struct Shape {
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    quantized: bool,
    #[serde(with = "as_text")]
    dtype: DType,
}

/// A way to make the step, and what it takes.
#[derive(Serialize)]
pub struct Row {
    batch_size: usize,
    seq_len: usize,
    #[serde(with = "as_text")]
    activations: Activations,
    feed_forward_rows: Option<usize>,
    dequantized_layers: usize,
    /// The pages that stay on the device, where it is not what was asked for.
    paged_budget: Option<usize>,
    #[serde(serialize_with = "report::peaks")]
    peak: Usage,
    /// What layers keep in host memory.
    host: usize,
    tok_s: Option<f64>,
    fits: bool,
}

impl Plan {
    fn new(args: &PlanArgs) -> Result<Plan> {
        // No data is read.
        let train = TrainArgs { data: Some(std::path::PathBuf::from("any").into()), ..args.train.clone() };
        let mut settings = Settings::resolve(&train, default_task::RECIPE)?;
        let given = args.memory.or(match settings.memory_budget.take() {
            Some(MemoryBudget::Bytes(bytes)) => Some(bytes),
            _ => None,
        });
        let room = Room::find(settings.device, given, true)?;
        let job = job(&settings, &room)?;
        let fastest = room.fastest(&job)?;
        let c = &job.config;
        Ok(Plan {
            model: Shape {
                layers: c.num_layers,
                hidden_size: c.hidden_size,
                vocab_size: c.vocab_size,
                quantized: job.quantized.is_some(),
                dtype: job.dtype,
            },
            trained: job.trained(),
            method: settings.method,
            batch_size: settings.batch_size,
            seq_len: settings.seq_len,
            choices: choices(&job, &room, &fastest)?,
            shapes: shapes(&job, &room)?,
            remedy: if fastest.is_none() { remedy(&job, &room)? } else { None },
            fastest: fastest.map(|choice| Row::new(&choice, &job, &room)),
            rates: room.rates(&job).map(|(_, worth)| worth),
            device: room.name,
            present: !room.imagined,
            memory: room.bytes,
            of: room.of,
        })
    }
}

/// Each thing that all layers may keep, what was asked for and what is fastest, from most memory to least.
fn choices(asked: &Job, room: &Room, fastest: &Option<Choice>) -> Result<Vec<Row>> {
    let mut jobs = vec![keeping(asked, Activations::default())];
    jobs.extend(cheaper(asked).map(|keep| keeping(asked, Activations::new(keep, usize::MAX, keep))));
    jobs.extend([least(asked), asked.clone()]);
    jobs.extend(fastest.iter().map(|choice| choice.job.clone()));
    let row = |job: Job| -> Result<Row> { Ok(Row::new(&Choice { usage: peak(&job)?, job }, asked, room)) };
    let mut rows = jobs.into_iter().map(row).collect::<Result<Vec<_>>>()?;
    let by = |row: &Row| (Reverse(row.peak.total_peak), row.kept());
    rows.sort_by_key(by);
    rows.dedup_by_key(|row| by(row));
    Ok(rows)
}

/// Smaller and larger batches and sequences, each at its fastest that fits, or else with as little as can be.
fn shapes(asked: &Job, room: &Room) -> Result<Vec<Row>> {
    let (batch, length) = (asked.settings.batch_size, asked.settings.seq_len);
    let mut shapes = vec![(1, length), (batch / 2, length), (batch, length), (2 * batch, length), (4 * batch, length)];
    shapes.extend([(batch, length / 2), (batch, 2 * length), (batch, 4 * length)]);
    shapes.retain(|&(batch, length)| batch > 0 && length > 1);
    shapes.sort_unstable();
    shapes.dedup();
    let row = |(batch, length)| -> Result<Row> {
        let mut job = asked.clone();
        (job.settings.batch_size, job.settings.seq_len) = (batch, length);
        let choice = match room.fastest(&job)? {
            Some(choice) => choice,
            None => {
                let job = least(&job);
                Choice { usage: peak(&job)?, job }
            }
        };
        Ok(Row::new(&choice, asked, room))
    };
    shapes.into_iter().map(row).collect()
}

impl Row {
    /// A choice, where `asked` was asked for.
    pub fn new(Choice { job, usage }: &Choice, asked: &Job, room: &Room) -> Row {
        let (settings, host) = (&job.settings, on_host(job));
        let paged_budget = match settings.paged_budget {
            Some(PagedBudget::Bytes(Bytes(bytes))) if settings.paged_budget != asked.settings.paged_budget => {
                Some(bytes)
            }
            _ => None,
        };
        Row {
            batch_size: settings.batch_size,
            seq_len: settings.seq_len,
            activations: settings.activations.clone(),
            feed_forward_rows: settings.feed_forward_rows,
            dequantized_layers: settings.dequantized_layers,
            paged_budget,
            peak: *usage,
            host,
            tok_s: room.rates(job).map(|(rates, _)| rates.speed(job)),
            fits: room.holds(usage) && host <= room.host,
        }
    }

    /// What layers keep, the rows that feed-forward blocks take at a time, and layers with dequantized weights.
    fn kept(&self) -> String {
        let rows = self.feed_forward_rows.map_or(String::new(), |rows| format!(" --feed-forward-rows {rows}"));
        let dense = match self.dequantized_layers {
            0 => String::new(),
            layers => format!(" --dequantized-layers {layers}"),
        };
        format!("{}{rows}{dense}", self.activations)
    }

    /// The option for the pages that leave the device for it, where some do.
    fn pages_away(&self) -> Option<String> {
        self.paged_budget.map(|bytes| format!("--paged-budget {}", Bytes(bytes)))
    }

    /// The options of the choice, where they are not those that were asked for.
    pub fn options(&self) -> String {
        let options = [format!("--activations {}", self.kept())];
        options.into_iter().chain(self.pages_away()).collect::<Vec<_>>().join(" ")
    }

    /// Speed, and whether it fits.
    fn verdict(&self) -> String {
        let speed = self.tok_s.map_or("unknown".into(), |speed| format!("{speed:.0}"));
        let fits = if self.fits { "yes" } else { "no" };
        format!("{speed:>10}  {fits}{}", self.pages_away().map_or(String::new(), |option| format!(", with {option}")))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let absent = if self.present { "" } else { "no GPU is here; for one like an " };
        let Shape { layers, hidden_size, vocab_size, quantized, dtype } = &self.model;
        writeln!(
            f,
            "device   {absent}{}: {}, {} of it for a step\n\
             model    {layers} layers, hidden {hidden_size}, vocabulary {vocab_size}, {}; computing in {dtype}\n\
             trains   {:.2}M parameters by {}\n",
            self.device,
            self.of,
            bytes(self.memory),
            if *quantized { "in 4 bits" } else { "not quantized" },
            self.trained as f64 / 1e6,
            self.method
        )?;

        let tags = Tag::ALL.map(|tag| format!("{:>12}", tag.to_string())).concat();
        writeln!(f, "{} x {} tokens a micro-batch, by what layers keep:", self.batch_size, self.seq_len)?;
        writeln!(f, "{:<36}      total{tags}        host      tok/s  fits", "--activations")?;
        for row in &self.choices {
            let tags = row.peak.peak.map(|peak| format!("{:>12}", bytes(peak))).concat();
            let (total, host) = (bytes(row.peak.total_peak), bytes(row.host));
            writeln!(f, "{:<36} {total:>10}{tags} {host:>11} {}", row.kept(), row.verdict())?;
        }

        writeln!(f, "\nOther shapes, each at its fastest that fits:\n   batch x seq      total      tok/s  fits")?;
        for row in &self.shapes {
            let (shape, total) = (format!("{} x {}", row.batch_size, row.seq_len), bytes(row.peak.total_peak));
            writeln!(f, "{shape:>14} {total:>10} {}, {}", row.verdict(), row.kept())?;
        }

        match (&self.fastest, &self.remedy) {
            (Some(row), _) => {
                let total = bytes(row.peak.total_peak);
                writeln!(f, "\nFastest that fits: {}, {total} at the peak.", row.options())?;
            }
            (None, remedy) => {
                writeln!(f, "\nNothing fits. What would: {}.", remedy.as_deref().unwrap_or(SMALLER))?;
            }
        }
        writeln!(f, "tok/s: {}.", self.rates.unwrap_or("no rates are known for this device and type"))
    }
}
