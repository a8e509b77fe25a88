//! Which parameters [`Direction::Muon`](crate::Direction::Muon) orthogonalises, and as which matrices.

use candle_core::{Result, Var, bail};

/// What `Direction::Muon` takes a parameter for: so many matrices of equal shape, one after the other in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrices {
    pub count: usize,
    pub rows: usize,
    pub cols: usize,
}

impl Matrices {
    /// A parameter of shape `dims` as `count` matrices.
    ///
    /// # Errors
    ///
    /// A shape that isn't that.
    pub fn new(name: &str, group: &str, dims: &[usize], count: usize) -> Result<Self> {
        let refuse = |what: String| -> Result<Self> {
            bail!(
                "`{name}`: `Direction::Muon` takes matrices, and kernels of convolutions as out x rest; {what}; its \
                 place is in the Adam part of group `{group}`, for which `matrices` must return 0"
            )
        };
        let elements: usize = dims.iter().product();
        if dims.len() < 2 || elements == 0 {
            return refuse(format!("got shape {dims:?}"));
        }
        if !dims[0].is_multiple_of(count) {
            return refuse(format!(
                "shape {dims:?} can't be split into {count} along its first dimension"
            ));
        }
        // Matrices that lie in the first dimension one by one, as those of experts do.
        let rows =
            if count > 1 && dims[0] == count && dims.len() > 2 { dims[1] } else { dims[0] / count };
        Ok(Self { count, rows, cols: elements / (count * rows) })
    }

    /// What the orthogonal matrix is multiplied by, so that its elements have the RMS of Adam's direction (Liu and
    /// others, 2025).
    pub fn scale(&self) -> f64 {
        0.2 * (self.rows.max(self.cols) as f64).sqrt()
    }
}

/// How many matrices [`Direction::Muon`](crate::Direction::Muon) takes a parameter for; 0 if it isn't for this parameter,
/// which then takes Adam. [`SrklBuilder::matrices`](crate::SrklBuilder::matrices) puts another rule in the place of this
/// one.
///
/// Muon is for the weights of hidden layers. The rule:
///
/// - A parameter with fewer than two dimensions (biases, norms), or of a single row or column, takes Adam. More
///   dimensions, as those of a convolution's kernel, are `out x rest`.
/// - Names are split at dots, and a last part `weight` is left out. **Embeddings** take Adam: one of the last two
///   parts contains `embed`, ends in `emb`, or is `wte`, `wpe`, `token`, `tokens`, `position` or `positions`. The **head**
///   takes Adam: the last part is `head`, `classifier`, `score`, `logits` or ends in `_head`, or the whole name is
///   `output`.
/// - **Queries, keys and values in one weight** are three matrices: the last part contains `qkv`, `c_attn`,
///   `in_proj` or `query_key_value`, and there are three times as many rows as columns.
/// - All others are one matrix.
///
/// Case does not matter. [`Srkl::new`](candle_nn::Optimizer::new), which has no names, goes by shapes alone:
/// embeddings and heads are then taken for hidden layers.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use candle_srkl::hidden_matrices;
///
/// let var = |shape: &[usize]| Var::zeros(shape, DType::F32, &Device::Cpu);
/// assert_eq!(hidden_matrices("model.layers.0.mlp.up_proj.weight", &var(&[256, 64])?), 1);
/// assert_eq!(hidden_matrices("h.0.attn.qkv.weight", &var(&[192, 64])?), 3);
/// assert_eq!(hidden_matrices("model.embed_tokens.weight", &var(&[1000, 64])?), 0);
/// assert_eq!(hidden_matrices("model.norm.weight", &var(&[64])?), 0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[must_use]
pub fn hidden_matrices(name: &str, var: &Var) -> usize {
    let dims = var.dims();
    let [rows, rest @ ..] = dims else { return 0 };
    let (rows, cols) = (*rows, rest.iter().product::<usize>());
    if dims.len() < 2 || rows < 2 || cols < 2 {
        return 0;
    }
    let name = name.to_lowercase();
    let mut parts: Vec<&str> = name.split('.').collect();
    if parts.len() > 1 && parts.ends_with(&["weight"]) {
        parts.pop();
    }
    let last = parts[parts.len() - 1];
    let embeds = |part: &&str| {
        const EXACT: [&str; 6] = ["wte", "wpe", "token", "tokens", "position", "positions"];
        part.contains("embed") || part.ends_with("emb") || EXACT.contains(part)
    };
    let is_head = ["head", "classifier", "score", "logits"].contains(&last)
        || last.ends_with("_head")
        || parts == ["output"];
    if parts.iter().rev().take(2).any(embeds) || is_head {
        return 0;
    }
    let is_qkv =
        ["qkv", "c_attn", "in_proj", "query_key_value"].iter().any(|name| last.contains(name));
    if is_qkv && rows == 3 * cols { 3 } else { 1 }
}
