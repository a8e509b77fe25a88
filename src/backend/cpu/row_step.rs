//! Steps a row of elements, and adds up the terms of its sums.
//!
//! Elements are taken [`WIDTH`] at a time, in arrays of that length: the compiler keeps these in registers and makes vector code of loops
//! over them, however many arrays there are. So all of a step is one loop, in which the arithmetic of some elements hides the latencies
//! of others.

use super::access::Parameter;
use super::moments::UNITS;
use super::simd::{LINE, Stream, WIDTH, each, load};
use crate::compact::UNIT;
use crate::numerics::Real;
use crate::rule::{Moments, apply_step};

/// What a row follows.
pub(crate) enum Followed<'r, C> {
    Known(Known<'r, C>),
    Adam(Adam<'r, C>),
}

/// A direction `d`, and the momentum `m` that it is made of. This is empty if it is the direction itself, perhaps before a mask: the
/// terms of `d m` are then those of `d^2`, since both have a term of 0 where an element is left out.
pub(crate) struct Known<'r, C> {
    pub d: &'r [C],
    pub m: &'r [C],
}

/// The direction of Adam, which is computed as the row is stepped.
pub(crate) struct Adam<'r, C> {
    pub m: &'r mut [C],
    pub v: &'r mut [C],
    pub g: &'r [C],
    pub moments: Moments<C>,
}

impl<C> Adam<'_, C> {
    /// The same, with a constant in place of `canonical`.
    #[inline(always)]
    fn canonical(self, canonical: bool) -> Self {
        Self { moments: Moments { canonical, ..self.moments }, ..self }
    }
}

impl<C> Followed<'_, C> {
    /// Whether the terms of `d m` are others than those of `d^2`.
    #[inline(always)]
    pub fn has_momentum(&self) -> bool {
        match self {
            Self::Known(known) => !known.m.is_empty(),
            Self::Adam(_) => true,
        }
    }
}

/// Gives the directions of a row, from its first element to its last.
trait RowDirections<C> {
    /// The direction, and the momentum that it is made of, of elements `at..at + N`.
    fn next<const N: usize>(&mut self, at: usize) -> [[C; N]; 2];
}

impl<C: Real> RowDirections<C> for Known<'_, C> {
    #[inline(always)]
    fn next<const N: usize>(&mut self, at: usize) -> [[C; N]; 2] {
        let d = load(&self.d[at..]);
        [d, if self.m.is_empty() { d } else { load(&self.m[at..]) }]
    }
}

impl<C: Real> RowDirections<C> for Adam<'_, C> {
    #[inline(always)]
    fn next<const N: usize>(&mut self, at: usize) -> [[C; N]; 2] {
        let Self { m, v, g, moments } = self;
        let (m, v, g) = (&mut m[at..at + N], &mut v[at..at + N], &g[at..at + N]);
        let new_m = each(|i| moments.first_moment(m[i], g[i]));
        let new_v = each::<_, N>(|i| moments.second_moment(v[i], g[i]));
        m.copy_from_slice(&new_m);
        v.copy_from_slice(&new_v);
        [each(|i| new_m[i].div(moments.denom(new_v[i]))), new_m]
    }
}

/// What is done with the terms of elements that have been stepped.
pub(crate) trait RowTerms<C> {
    /// `steps` are the steps of elements `at..at + N` as stored, `d` their directions, `m` the momenta.
    fn add<const N: usize>(
        &mut self,
        at: usize,
        steps: impl Fn(usize) -> f64,
        d: [C; N],
        m: [C; N],
    );
}

/// There are no sums.
pub(crate) struct NoSums;

impl<C> RowTerms<C> for NoSums {
    #[inline(always)]
    fn add<const N: usize>(&mut self, _: usize, _: impl Fn(usize) -> f64, _: [C; N], _: [C; N]) {}
}

/// The sums of a row, over `D^2`, `d^2` and `d m`, with `D` the step as stored.
pub(crate) struct RowSums<'a> {
    pub lanes: [&'a mut [f64]; 3],
    /// The terms of `D^2`.
    pub squares: &'a mut [f64],
    /// Whether there are terms of `d m`: see [`Followed::has_momentum`].
    pub has_momentum: bool,
}

impl<C: Real> RowTerms<C> for RowSums<'_> {
    #[inline(always)]
    fn add<const N: usize>(
        &mut self,
        at: usize,
        steps: impl Fn(usize) -> f64,
        d: [C; N],
        m: [C; N],
    ) {
        let Self { lanes, squares, has_momentum } = self;
        let [step, direction, along] = lanes.each_mut().map(|lanes| &mut lanes[at..at + N]);
        let terms = each::<_, N>(|i| steps(i) * steps(i));
        squares[at..at + N].copy_from_slice(&terms);
        step.copy_from_slice(&each::<_, N>(|i| step[i] + terms[i]));
        direction.copy_from_slice(&each::<_, N>(|i| d[i].add_product(d[i], direction[i])));
        if *has_momentum {
            along.copy_from_slice(&each::<_, N>(|i| d[i].add_product(m[i], along[i])));
        }
    }
}

/// A row of parameters. They are stepped in the compute type, as their masters if there are any, and stored rounded.
pub(crate) struct RowStep<'a, P: Parameter> {
    pub w: &'a mut [P],
    pub master: Option<&'a mut [P::Compute]>,
    /// The bases of the offsets by which the units of a row of bf16 parameters are rounded at random; `None` if they are rounded to
    /// nearest.
    pub random: Option<[u32; UNITS]>,
}

/// The `step_size` and `decay_factor` of a row's elements: numbers, where they are the same for all. A large closure may not be inlined,
/// and is then compiled for the baseline, and called for every few elements; `Each` accepts that.
pub(crate) enum StepSizes<C, F> {
    All((C, C)),
    /// Of each element by its index, where each is braked by itself.
    Each(F),
}

impl<P: Parameter> RowStep<'_, P> {
    /// Steps all elements, and asks for as many of each stream to be brought into the caches.
    #[inline(always)]
    pub fn follow<T: RowTerms<P::Compute>>(
        self,
        followed: Followed<P::Compute>,
        terms: &mut T,
        sizes: StepSizes<P::Compute, impl Fn(usize) -> (P::Compute, P::Compute)>,
        streams: &[Stream],
    ) {
        use {Followed::*, StepSizes::*};
        match (followed, sizes) {
            (Known(d), Each(sizes)) => self.run::<1, _, _>(d, terms, sizes, streams),
            (Adam(d), Each(sizes)) => self.run::<1, _, _>(d, terms, sizes, streams),
            (Known(d), All(sizes)) => self.run::<WIDTH, _, _>(d, terms, |_| sizes, streams),
            // A loop for each: one that asked would not be faster where nothing is looked for.
            (Adam(d), All(sizes)) if d.moments.canonical => {
                self.run::<WIDTH, _, _>(d.canonical(true), terms, |_| sizes, streams)
            }
            (Adam(d), All(sizes)) => {
                self.run::<WIDTH, _, _>(d.canonical(false), terms, |_| sizes, streams)
            }
        }
    }

    #[inline(always)]
    fn run<const N: usize, D: RowDirections<P::Compute>, T: RowTerms<P::Compute>>(
        mut self,
        directions: D,
        terms: &mut T,
        sizes: impl Fn(usize) -> (P::Compute, P::Compute),
        streams: &[Stream],
    ) {
        // Two loops, since one that asked at each turn whether there are masters would take a sixth longer.
        match self.master {
            Some(_) => self.run_by::<N, true, _, _>(directions, terms, sizes, streams),
            None => self.run_by::<N, false, _, _>(directions, terms, sizes, streams),
        }
    }

    #[inline(always)]
    fn run_by<
        const N: usize,
        const MASTER: bool,
        D: RowDirections<P::Compute>,
        T: RowTerms<P::Compute>,
    >(
        &mut self,
        mut directions: D,
        terms: &mut T,
        sizes: impl Fn(usize) -> (P::Compute, P::Compute),
        streams: &[Stream],
    ) {
        let len = self.w.len();
        let whole = len - len % N;
        for at in (0..whole).step_by(N) {
            if at % LINE == 0 {
                streams.iter().for_each(|stream| stream.prefetch(at));
            }
            self.step::<N, MASTER, _, _>(at, &mut directions, terms, sizes(at));
        }
        for at in whole..len {
            self.step::<1, MASTER, _, _>(at, &mut directions, terms, sizes(at));
        }
    }

    /// Steps elements `at..at + N`.
    #[inline(always)]
    fn step<
        const N: usize,
        const MASTER: bool,
        D: RowDirections<P::Compute>,
        T: RowTerms<P::Compute>,
    >(
        &mut self,
        at: usize,
        directions: &mut D,
        terms: &mut T,
        (step_size, decay_factor): (P::Compute, P::Compute),
    ) {
        let Self { w, master, random } = self;
        let w = &mut w[at..at + N];
        let master = master.as_deref_mut().filter(|_| MASTER).map(|master| &mut master[at..at + N]);
        let [d, m] = directions.next::<N>(at);
        let before = each::<_, N>(|i| w[i].widen());
        let x = master.as_deref().map_or(before, load);
        let x = each::<_, N>(|i| apply_step(x[i], d[i], step_size, decay_factor));
        if let Some(master) = master {
            master.copy_from_slice(&x);
        }
        match random {
            // Only where there are masters: those in memory, or decoded for this row.
            Some(bases) if MASTER => P::round_part(w, &x, bases[at / UNIT], (at % UNIT) as u32),
            _ => w.copy_from_slice(&each::<_, N>(|i| P::narrow_canonical(x[i]))),
        }
        terms.add(at, |i| w[i].widen().to_f64() - before[i].to_f64(), d, m);
    }
}
