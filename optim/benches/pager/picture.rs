//! The table as a picture: a bar a case, and where the ceilings would put its end.

use crate::measure::Row;
use plotters::prelude::*;
use std::{error::Error, fs, path::Path};

const WIDTH: i32 = 1000;
/// Pixels from the left edge to where bars start, and from where the longest ends to the right edge.
const NAMES: i32 = 300;
const NUMBERS: i32 = 90;
/// Height of a case, and of what is above the first.
const LINE: i32 = 20;
const TOP: i32 = 70;

/// Draws `rows`; the axis is logarithmic.
pub fn draw(path: &Path, rows: &[Row], title: &str) -> Result<(), Box<dyn Error>> {
    let times = rows.iter().flat_map(|row| [row.device, row.bound]).filter(|&time| time > 0.0);
    let (least, most) = times.fold((f64::INFINITY, 0f64), |(least, most), time| (least.min(time), most.max(time)));
    if least > most {
        return Ok(());
    }
    let low = least.log10().floor();
    let high = most.log10().ceil().max(low + 1.0);
    let x = |time: f64| {
        let share = (time.max(least).log10() - low) / (high - low);
        NAMES + (share * f64::from(WIDTH - NAMES - NUMBERS)) as i32
    };
    let (grey, blue, red) = (RGBColor(225, 225, 225), RGBColor(96, 140, 196), RGBColor(190, 30, 45));
    let text = |size| ("sans-serif", size).into_font();
    let mut picture = String::new();
    {
        let bottom = TOP + LINE * rows.len() as i32;
        let area = SVGBackend::with_string(&mut picture, (WIDTH as u32, (bottom + 10) as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        area.draw(&Text::new(title.to_string(), (10, 8), text(16)))?;
        let legend = "bars: milliseconds of a step on the device; red: at the rates measured in the same run";
        area.draw(&Text::new(legend, (10, 30), text(12)))?;
        for power in low as i32..=high as i32 {
            let time = 10f64.powi(power);
            let at = NAMES + ((f64::from(power) - low) / (high - low) * f64::from(WIDTH - NAMES - NUMBERS)) as i32;
            area.draw(&PathElement::new([(at, TOP - 4), (at, bottom)], grey))?;
            area.draw(&Text::new(format!("{time} ms"), (at - 10, TOP - 18), text(11)))?;
        }
        for (i, row) in rows.iter().enumerate() {
            let y = TOP + LINE * i as i32;
            area.draw(&Text::new(row.name.clone(), (10, y + 4), text(12)))?;
            area.draw(&Rectangle::new([(NAMES, y + 4), (x(row.device), y + LINE - 4)], blue.filled()))?;
            area.draw(&PathElement::new([(x(row.bound), y + 1), (x(row.bound), y + LINE - 1)], red.stroke_width(2)))?;
            let end = x(row.device.max(row.bound));
            area.draw(&Text::new(format!("{:.2}", row.device), (end + 6, y + 4), text(12)))?;
        }
        area.present()?;
    }
    fs::write(path, picture)?;
    Ok(())
}
