//! What settings must hold, each mistake with its option named.

use super::*;

impl Settings {
    /// Refuses values that mean nothing, and options that do not go together.
    pub(super) fn check(&self) -> Result<()> {
        let positive = |name, value: usize| {
            ensure!(value > 0, "--{name} must be at least 1");
            Ok(())
        };
        positive("batch-size", self.batch_size)?;
        positive("grad-accum", self.grad_accum)?;
        positive("rank", self.rank)?;
        // The width of the largest Llama: more only asks for memory.
        ensure!(self.rank <= 16_384, "--rank must be at most 16384");
        ensure!(self.seq_len > 1, "--seq-len must be at least 2: one token to read and one to predict");
        ensure!(self.steps != Some(0) && self.epochs != Some(0), "--steps and --epochs must be at least 1");
        ensure!(self.steps.is_none() || self.epochs.is_none(), "give --steps or --epochs, not both");
        ensure!(self.lr.is_finite() && self.lr > 0.0, "--lr must be above 0");
        ensure!(self.max_grad_norm >= 0.0, "--max-grad-norm must not be negative (0 turns clipping off)");
        ensure!((0.0..1.0).contains(&self.dropout), "--dropout must be at least 0 and below 1");
        ensure!(self.alpha.is_finite() && self.alpha > 0.0, "--alpha must be above 0");
        ensure!(self.betas.iter().all(|b| (0.0..1.0).contains(b)), "--betas must be at least 0 and below 1");
        ensure!(self.eps.is_finite() && self.eps > 0.0, "--eps must be above 0");
        ensure!(self.weight_decay.is_finite() && self.weight_decay >= 0.0, "--weight-decay must not be negative");
        let block = self.block_size;
        ensure!(
            block.is_power_of_two() && (32..=4096).contains(&block),
            "--block-size must be a power of two from 32 to 4096"
        );
        match (self.method, self.quant) {
            (Method::Qlora, Some(QuantChoice(None))) => {
                bail!("--method qlora needs --quant nf4 or fp4 (or use --method lora)")
            }
            (Method::Full, Some(QuantChoice(Some(_)))) => {
                bail!("--method full trains the weights themselves: --quant none")
            }
            _ => {}
        }
        ensure!(
            self.method != Method::Full || self.embedding_bits == EmbeddingBits::Stored,
            "--method full trains embedding and head: leave --embedding-bits 8 out"
        );
        ensure!(
            self.method != Method::Full || self.adapter_init.is_none(),
            "--method full trains no adapter: leave --adapter-init out"
        );
        self.check_adapter()?;
        let page = self.page_size.0;
        ensure!(
            page >= 256 << 10 && page.is_multiple_of(64 << 10),
            "--page-size must be a multiple of 64KiB from 256KiB on, not {}",
            self.page_size
        );
        if let Some(PagedBudget::Bytes(budget)) = self.paged_budget {
            ensure!(
                budget.0 == 0 || budget.0 >= page,
                "--paged-budget {budget} is below one page of {}: give 0 (all pages in host memory), at least {0}, or auto",
                self.page_size
            );
        }
        ensure!(
            self.memory_budget.is_none()
                || (self.activations == Activations::default()
                    && self.feed_forward_rows.is_none()
                    && self.dequantized_layers == 0),
            "--memory-budget chooses what layers keep: leave --activations, --recompute, --feed-forward-rows and \
             --dequantized-layers out"
        );
        ensure!(self.feed_forward_rows != Some(0), "--feed-forward-rows must be at least 1");
        ensure!(
            self.feed_forward_rows.is_none() || !self.drops(),
            "--feed-forward-rows needs --dropout 0: a dropout mask is made for all rows"
        );
        ensure!(self.save_every != Some(0), "--save-every must be at least 1");
        // A year, which is as good as never and far from what a clock can count.
        ensure!((0.0..=525_600.0).contains(&self.save_minutes), "--save-minutes must be 0 to 525600");
        positive("keep", self.keep)?;
        ensure!(self.eval_every != Some(0), "--eval-every must be at least 1");
        ensure!(self.patience != Some(0), "--patience must be at least 1");
        ensure!(self.patience.is_none() || self.eval_every.is_some(), "--patience needs --eval-every");
        ensure!(
            self.eval_every.is_none() || self.eval_data.is_some() || self.data.is_none(),
            "--eval-every needs --eval-data: data to evaluate on"
        );
        ensure!(self.model.is_none() || self.data.is_some(), "--model needs --data: data to train on");
        Ok(())
    }

    /// Whether a new adapter's inputs are dropped.
    pub fn drops(&self) -> bool {
        self.method != Method::Full && self.adapter_init.is_none() && self.dropout > 0.0
    }

    /// What is special about the adapter.
    fn check_adapter(&self) -> Result<()> {
        ensure!(
            self.lora_plus_ratio.is_finite() && self.lora_plus_ratio > 0.0,
            "--lora-plus-ratio must be above 0 (1 for one learning rate)"
        );
        ensure!(
            !self.targets.iter().any(|name| name == ALL_LINEAR) || self.targets.len() == 1,
            "--targets {ALL_LINEAR} stands alone"
        );
        let whole = !self.modules_to_save.is_empty() || !self.new_tokens.is_empty();
        if let Some(name) = self.modules_to_save.iter().find(|name| !["embed_tokens", "lm_head"].contains(&&name[..])) {
            bail!("--modules-to-save: {name} is none of embed_tokens and lm_head");
        }
        ensure!(
            !whole || self.embedding_bits == EmbeddingBits::Stored,
            "--modules-to-save and --new-tokens train embedding and head: leave --embedding-bits 8 out"
        );
        let special = self.dora || self.init != Init::Lora || whole;
        ensure!(
            !special || self.method != Method::Full,
            "--method full trains no adapter: leave --dora, --init, --modules-to-save and --new-tokens out"
        );
        ensure!(
            !special || self.adapter_init.is_none(),
            "--adapter-init goes on with an adapter as it is: leave --dora, --init, --modules-to-save and --new-tokens out"
        );
        ensure!(!self.dora || self.init == Init::Lora, "--dora starts from plain adapters: leave --init out");
        ensure!(
            !matches!(self.init, Init::Loftq { .. }) || self.method == Method::Qlora,
            "--init loftq makes up for quantization: it needs --method qlora"
        );
        ensure!(
            self.init == Init::Lora || self.embedding_bits == EmbeddingBits::Stored,
            "--init {} writes the changed base, embedding too: leave --embedding-bits 8 out",
            self.init
        );
        Ok(())
    }
}
