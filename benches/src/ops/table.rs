//! A report for people: what the device can do at all, then a line for each op and M; and its lines for spreadsheets.

use std::fmt;

use super::{OpsReport, Peaks};

impl fmt::Display for OpsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Peaks { bytes_per_s, copy_bytes_per_s, kernel_bytes_per_s, flops_per_s, matrix_flops_per_s } = self.peaks;
        writeln!(f, "{}: {}, {} tier, {}; {}", self.device, self.name, self.tier, self.arithmetic, self.driver)?;
        let [best, copy, kernel] = [bytes_per_s, copy_bytes_per_s, kernel_bytes_per_s].map(|bytes| bytes / 1e9);
        writeln!(f, "bandwidth          {best:.1} GB/s (copy command {copy:.1}, kernel in place {kernel:.1})")?;
        writeln!(f, "multiply-adds      {:.1} GFLOP/s", flops_per_s / 1e9)?;
        if let Some(of_matrices) = matrix_flops_per_s {
            writeln!(f, "on matrix units    {:.1} GFLOP/s", of_matrices / 1e9)?;
        }
        let dispatch = self.dispatch;
        let [independent, dependent, submit] =
            [dispatch.independent_ns, dispatch.dependent_ns, dispatch.submit_ns].map(|ns| ns / 1e3);
        writeln!(f, "a small dispatch   {independent:.2} us alone, {dependent:.2} us after another it waits for")?;
        writeln!(f, "                   {submit:.2} us of the host to hand over")?;
        writeln!(f, "{} {}, {} passes", self.shape.model, self.format, self.num_passes)?;
        let head = ["us", "us median", "GB/s", "GFLOP/s", "roofline"];
        write!(f, "{:<20}{:<30}{:>5}", "op", "shape", "M")?;
        head.iter().try_for_each(|name| write!(f, "{name:>11}"))?;
        writeln!(f)?;
        for op in &self.ops {
            write!(f, "{:<20}{:<30}{:>5}", op.name, op.shape, op.m)?;
            write!(f, "{:>11.1}{:>11.1}", op.best_ns / 1e3, op.median_ns / 1e3)?;
            write!(f, "{:>11.1}{:>11.1}", op.bytes_per_s / 1e9, op.flops_per_s / 1e9)?;
            let verdict = if op.is_too_good() { "  not valid: a peak was measured too low" } else { "" };
            writeln!(f, "{:>9.1} %{verdict}", op.roofline_share * 100.0)?;
        }
        for skipped in &self.skipped {
            writeln!(f, "left out: {skipped}")?;
        }
        for cliff in &self.cliffs {
            let what = if cliff.is_steep { "a cliff" } else { "a row costs more" };
            let (time, row) = (cliff.ratio, cliff.row_ratio);
            writeln!(
                f,
                "{what}: {} {}, M {} to {}: {time:.2} x the time, {row:.2} x that of a row",
                cliff.name,
                cliff.shape,
                cliff.m,
                cliff.m + 1
            )?;
        }
        Ok(())
    }
}

impl OpsReport {
    /// A head and a line for each op and M, after RFC 4180. No name has a comma or a quote in it; shapes may.
    pub fn csv(&self) -> String {
        let mut text = "op,shape,m,best_us,median_us,gb_per_s,gflop_per_s,roofline_share\n".to_owned();
        for op in &self.ops {
            let [best, median] = [op.best_ns, op.median_ns].map(|ns| ns / 1e3);
            let [bytes, flops] = [op.bytes_per_s, op.flops_per_s].map(|rate| rate / 1e9);
            let (name, shape, m, share) = (&op.name, &op.shape, op.m, op.roofline_share);
            text += &format!("{name},\"{shape}\",{m},{best:.2},{median:.2},{bytes:.3},{flops:.3},{share:.4}\n");
        }
        text
    }
}
