//! `compare`: finished or running runs beside each other.

use crate::{
    cli::CompareArgs,
    commands::print,
    report::{StepMetrics, curves, html, read_metrics},
};
use anyhow::{Context, Result};
use nibble_models::files::atomic::{atomic_write, read_json_object, read_text};
use serde_json::{Map, Value, json};
use std::{collections::BTreeSet, path::Path};

/// What is read of a run's folder.
struct Run {
    name: String,
    settings: toml::Table,
    steps: Vec<StepMetrics>,
    /// `summary.json`; empty while the run goes on.
    summary: Map<String, Value>,
}

impl Run {
    fn read(dir: &Path) -> Result<Run> {
        let path = dir.join("settings.toml");
        let text = read_text(&path).with_context(|| format!("{} holds no run", dir.display()))?;
        let settings = text.parse().with_context(|| format!("{} is not TOML", path.display()))?;
        let summary = dir.join("summary.json");
        let summary = if summary.exists() { read_json_object(&summary)? } else { Map::new() };
        Ok(Run { name: dir.display().to_string(), settings, steps: read_metrics(dir)?, summary })
    }

    /// What came out, by name; what there is not is null.
    fn figures(&self) -> Vec<(&'static str, Value)> {
        let of = |when: &str, what: &str| self.summary.get(when).and_then(|result| result.get(what)).cloned();
        let mean = curves::running_mean(&self.steps).last().map(|&(_, loss)| loss);
        let mut speeds: Vec<f64> = self.steps.iter().map(|step| step.tok_s).collect();
        speeds.sort_by(f64::total_cmp);
        let tokens: usize = self.steps.iter().map(|step| step.tokens).sum();
        vec![
            ("steps", self.steps.len().into()),
            ("tokens", tokens.into()),
            ("loss, running mean", mean.into()),
            ("nll before", of("before", "nll").into()),
            ("nll after", of("after", "nll").into()),
            ("best nll", of("best", "nll").into()),
            ("exact match before", of("before", "exact_match").into()),
            ("exact match after", of("after", "exact_match").into()),
            ("tokens a second, median", speeds.get(speeds.len() / 2).copied().into()),
            ("seconds", self.summary.get("seconds").cloned().into()),
        ]
    }
}

/// Prints figures of runs and the settings in which they differ, and draws their curves.
pub fn compare_command(args: &CompareArgs) -> Result<()> {
    let runs: Vec<Run> = args.runs.iter().map(|dir| Run::read(dir)).collect::<Result<_>>()?;
    let different = different(&runs);
    if let Some(path) = &args.html {
        let page = page(&runs, &different)?;
        atomic_write(path, |out| out.write_all(page.as_bytes()))?;
        crate::note!("wrote {}", path.display());
    }
    if args.json {
        let runs = runs.iter().map(|run| {
            let settings: Map<String, Value> =
                different.iter().map(|key| (key.clone(), setting(run, key).into())).collect();
            let figures: Map<String, Value> =
                run.figures().into_iter().map(|(name, value)| (name.into(), value)).collect();
            json!({ "run": run.name, "figures": figures, "settings": settings })
        });
        return print(&(Value::Array(runs.collect()).to_string() + "\n"));
    }
    print(&columns(&rows(&runs, &different)))
}

/// Settings that are not the same in all runs, without the folder of results.
fn different(runs: &[Run]) -> Vec<String> {
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.settings.keys()).filter(|key| *key != "out").collect();
    let differs = |key: &&&String| runs.iter().any(|run| setting(run, key) != setting(&runs[0], key));
    keys.iter().filter(differs).map(|key| (*key).clone()).collect()
}

fn setting(run: &Run, key: &str) -> Option<String> {
    run.settings.get(key).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// The names of the runs, then a row for each figure and each setting that differs.
fn rows(runs: &[Run], different: &[String]) -> Vec<Vec<String>> {
    let row = |name: &str, cells: Vec<String>| [vec![name.to_owned()], cells].concat();
    let mut rows = vec![row("", runs.iter().map(|run| run.name.clone()).collect())];
    let figures: Vec<_> = runs.iter().map(Run::figures).collect();
    for (number, (name, _)) in figures[0].iter().enumerate() {
        if figures.iter().any(|figures| !figures[number].1.is_null()) {
            rows.push(row(name, figures.iter().map(|figures| shown(&figures[number].1)).collect()));
        }
    }
    for key in different {
        let cells = runs.iter().map(|run| setting(run, key).unwrap_or_else(|| "-".into()));
        rows.push(row(key, cells.collect()));
    }
    rows
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Number(number) if number.is_f64() => format!("{:.4}", number.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    }
}

/// Rows as columns of text.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn page(runs: &[Run], different: &[String]) -> Result<String> {
    let rows = rows(runs, different);
    let mut out = html::head("runs compared");
    out += &html::table(&rows[0], &rows[1..]);
    let curve = |value: fn(&[StepMetrics]) -> Vec<(f64, f64)>| -> Vec<curves::Curve> {
        let curve = |(colour, run): (usize, &Run)| curves::Curve {
            name: run.name.clone(),
            points: value(&run.steps),
            colour,
            pale: false,
        };
        runs.iter().enumerate().map(curve).collect()
    };
    out += &curves::draw("loss, running mean", "nats a token", &curve(curves::running_mean))?;
    let held_out = curve(|steps| curves::values(steps, |step| step.eval_nll));
    if held_out.iter().any(|curve| !curve.points.is_empty()) {
        out += &curves::draw("held-out loss", "nats a token", &held_out)?;
    }
    out += &curves::draw("gradient norm", "", &curve(|steps| curves::values(steps, |step| Some(step.grad_norm))))?;
    out += &curves::draw("speed", "tokens a second", &curve(|steps| curves::values(steps, |step| Some(step.tok_s))))?;
    Ok(out + "</body></html>\n")
}
