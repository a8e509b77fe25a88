//! The formats of state: how rows of it are converted to and from the compute type.

use candle_core::CpuStorage;
use half::bf16;

use super::access::{Parameter, Samples, agree};
use super::gradient::{Compute, RowBuffer};
use super::moments::{self, Compact, Moment};
use super::simd::{Stream, first};
use crate::compact::{self, UNIT};
use crate::numerics::bf16_to_f32;
use crate::state::{Format, Slot, State};

/// The state of neighbouring elements of a block, in some format. A packed format decodes its numbers into `room`,
/// and encodes them from there after they have changed.
pub(crate) trait StateRows<C>: Send + Sync + Sized {
    /// Whether some of it is converted.
    const PACKED: bool;

    /// Splits off the first `len` elements.
    fn take(&mut self, len: usize) -> Self;

    /// Elements `start..start + len`, to be read.
    fn read<'r>(&'r self, start: usize, len: usize, room: &'r mut Room) -> Row<'r, C>;

    /// The same of the average.
    fn read_average<'r>(
        &'r self,
        start: usize,
        len: usize,
        room: &'r mut RowBuffer,
    ) -> Option<&'r [C]>;

    /// All elements, at most a row of lanes, to be changed; [`StateRows::store`] must follow. `w` are the parameters.
    fn load<'r, P: Parameter<Compute = C>>(
        &'r mut self,
        w: &[P],
        room: &'r mut Room,
    ) -> RowMut<'r, C>;

    /// Where masters, moments and average are in memory from element `start` on.
    fn streams(&self, start: usize) -> [Option<Stream>; 4];

    /// Stores what was changed after [`StateRows::load`]. `w` are the parameters, which have been stepped.
    fn store<P: Parameter<Compute = C>>(&mut self, w: &[P], room: &mut Room);

    /// Resets all masters of a block if its parameter seems to have been overwritten as a whole.
    fn reset_masters<P: Parameter<Compute = C>>(&mut self, w: &[P], samples: Samples);

    /// Takes the room for samples of the parameter apart, which [`Samples::note`] writes to after the update.
    fn take_samples<'s>(&mut self) -> &'s mut [i16]
    where
        Self: 's,
    {
        &mut []
    }
}

/// Buffers for a row of each kind of state.
pub(crate) type Room = [RowBuffer; 6];

/// A row of each kind of state that exists, of those that a direction is computed from.
pub(crate) struct Row<'r, C> {
    pub m: Option<&'r [C]>,
    pub v: Option<&'r [C]>,
    pub v_max: Option<&'r [C]>,
    pub q: Option<&'r [C]>,
}

/// The same, with all that a step changes.
pub(crate) struct RowMut<'r, C> {
    pub master: Option<&'r mut [C]>,
    pub m: Option<&'r mut [C]>,
    pub v: Option<&'r mut [C]>,
    pub v_max: Option<&'r mut [C]>,
    pub average: Option<&'r mut [C]>,
    pub q: Option<&'r mut [C]>,
    /// Whether both moments are compact: any NaN in them is encoded alike.
    pub compact: bool,
}

/// State of f32 or f64, stored as it is computed with.
pub(crate) struct Exact<'a, C> {
    master: Option<&'a mut [C]>,
    m: Option<&'a mut [C]>,
    v: Option<&'a mut [C]>,
    v_max: Option<&'a mut [C]>,
    average: Option<&'a mut [C]>,
    q: Option<&'a mut [C]>,
}

impl<'a, C: Compute> Exact<'a, C> {
    /// # Panics
    ///
    /// If some of the state is packed, which is for [`Packed`]: it would be overlooked.
    pub fn new(state: &'a mut State) -> Self {
        fn numbers<C: Compute>(slot: &mut Option<Slot>) -> Option<&mut [C]> {
            slot.as_mut().and_then(Slot::cpu_mut).and_then(C::numbers_mut)
        }
        assert!(!state.is_packed(), "packed state taken for numbers");
        let State { master, m, v, v_max, average, q } = state;
        let [master, m, v] = [master, m, v].map(numbers);
        let [v_max, average, q] = [v_max, average, q].map(numbers);
        Self { master, m, v, v_max, average, q }
    }
}

impl<C: Compute> StateRows<C> for Exact<'_, C> {
    const PACKED: bool = false;

    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        #[inline(always)]
        fn take<'a, C>(numbers: &mut Option<&'a mut [C]>, len: usize) -> Option<&'a mut [C]> {
            numbers.as_mut().map(|numbers| first(numbers, len))
        }
        // Each by itself: `map` over an array of these was not inlined, and compiled for the baseline.
        Self {
            master: take(&mut self.master, len),
            m: take(&mut self.m, len),
            v: take(&mut self.v, len),
            v_max: take(&mut self.v_max, len),
            average: take(&mut self.average, len),
            q: take(&mut self.q, len),
        }
    }

    #[inline(always)]
    fn read<'r>(&'r self, start: usize, len: usize, _: &'r mut Room) -> Row<'r, C> {
        let Self { m, v, v_max, q, .. } = self;
        let [m, v, v_max, q] = [m, v, v_max, q].map(|slot| part(slot, start, len));
        Row { m, v, v_max, q }
    }

    #[inline(always)]
    fn read_average<'r>(
        &'r self,
        start: usize,
        len: usize,
        _: &'r mut RowBuffer,
    ) -> Option<&'r [C]> {
        part(&self.average, start, len)
    }

    #[inline(always)]
    fn load<'r, P: Parameter<Compute = C>>(
        &'r mut self,
        _: &[P],
        _: &'r mut Room,
    ) -> RowMut<'r, C> {
        let Self { master, m, v, v_max, average, q } = self;
        RowMut {
            master: master.as_deref_mut(),
            m: m.as_deref_mut(),
            v: v.as_deref_mut(),
            v_max: v_max.as_deref_mut(),
            average: average.as_deref_mut(),
            q: q.as_deref_mut(),
            compact: false,
        }
    }

    #[inline(always)]
    fn streams(&self, start: usize) -> [Option<Stream>; 4] {
        let stream = |numbers: &Option<&mut [C]>| Some(Stream::of(numbers.as_deref()?, start));
        [stream(&self.master), stream(&self.m), stream(&self.v), stream(&self.average)]
    }

    #[inline(always)]
    fn store<P: Parameter<Compute = C>>(&mut self, _: &[P], _: &mut Room) {}

    fn reset_masters<P: Parameter<Compute = C>>(&mut self, w: &[P], samples: Samples) {
        if let Some(master) = &mut self.master {
            reset(master, w, samples);
        }
    }
}

#[inline(always)]
fn part<'r, C>(slot: &'r Option<&mut [C]>, start: usize, len: usize) -> Option<&'r [C]> {
    slot.as_deref().map(|slot| &slot[start..start + len])
}

fn reset<P: Parameter>(master: &mut [P::Compute], w: &[P], samples: Samples) {
    if samples.each().any(|(_, i)| !agree(w[i], master[i])) {
        master.iter_mut().zip(w).for_each(|(master, w)| *master = w.widen());
    }
}

/// The squared row norms `q`, which are never packed.
pub(crate) fn row_norms<C: Compute>(state: &mut State) -> Option<&mut [C]> {
    state.q.as_mut().and_then(Slot::cpu_mut).and_then(C::numbers_mut)
}

/// State of f32 parameters, or of parameters of 16 bits, some of which is packed.
pub(crate) struct Packed<'a> {
    master: Option<Master<'a>>,
    m: Option<Numbers<'a>>,
    v: Option<Numbers<'a>>,
    v_max: Option<Numbers<'a>>,
    average: Option<Numbers<'a>>,
    q: Option<Numbers<'a>>,
    keys: Keys,
    /// The number of its first unit in the block.
    unit: u64,
}

/// The keys of the offsets by which a block is rounded in a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Keys {
    moments: u64,
    averages: u64,
    pub parameters: u64,
}

impl Keys {
    /// Of the block at `place`, in the step after `steps` others.
    pub fn new(steps: u64, place: u64) -> Self {
        let [moments, averages, parameters] =
            [compact::MOMENTS, compact::AVERAGES, compact::PARAMETERS]
                .map(|seed| compact::offset_key(seed, steps, place));
        Self { moments, averages, parameters }
    }
}

enum Master<'a> {
    F32(&'a mut [f32]),
    /// The remainders, and the samples of the parameter.
    Split(&'a mut [i16], &'a mut [i16]),
    /// The parameter itself, in f32: it is rounded at random afterwards.
    Rounded,
}

enum Numbers<'a> {
    F32(&'a mut [f32]),
    BF16(&'a mut [bf16]),
    CompactM(Compact<'a>),
    CompactV(Compact<'a>),
}

impl<'a> Numbers<'a> {
    fn new(name: &str, slot: &'a mut Slot, n: usize) -> Option<Self> {
        Some(match slot.cpu_mut()? {
            CpuStorage::F32(numbers) => Self::F32(numbers),
            CpuStorage::BF16(numbers) => Self::BF16(numbers),
            CpuStorage::U8(bytes) => {
                let (codes, exponents) = bytes.split_at_mut(n.next_multiple_of(UNIT));
                let compact = Compact { codes: &mut codes[..n], exponents };
                if name == "v" { Self::CompactV(compact) } else { Self::CompactM(compact) }
            }
            _ => return None,
        })
    }

    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        match self {
            Self::F32(numbers) => Self::F32(first(numbers, len)),
            Self::BF16(numbers) => Self::BF16(first(numbers, len)),
            Self::CompactM(compact) => Self::CompactM(compact.take(len)),
            Self::CompactV(compact) => Self::CompactV(compact.take(len)),
        }
    }

    #[inline(always)]
    fn stream(&self, start: usize) -> Stream {
        match self {
            Self::F32(numbers) => Stream::of(numbers, start),
            Self::BF16(numbers) => Stream::of(numbers, start),
            Self::CompactM(Compact { codes, .. }) | Self::CompactV(Compact { codes, .. }) => {
                Stream::of(codes, start)
            }
        }
    }

    /// Converts the numbers from `start` on; a compact first moment goes by `v`.
    #[inline(always)]
    fn decode(&self, start: usize, v: Option<&[f32]>, row: &mut [f32]) {
        let len = row.len();
        match self {
            Self::F32(numbers) => row.copy_from_slice(&numbers[start..start + len]),
            Self::BF16(numbers) => {
                let numbers = &numbers[start..start + len];
                row.iter_mut().zip(numbers).for_each(|(x, p)| *x = bf16_to_f32(p.to_bits()));
            }
            Self::CompactV(compact) => {
                for (row, (codes, exponent)) in row.chunks_mut(UNIT).zip(compact.units(start, len))
                {
                    compact::decode_v_unit(codes, exponent, row);
                }
            }
            Self::CompactM(compact) => {
                let units = compact.units(start, len);
                for (u, (row, (codes, exponent))) in row.chunks_mut(UNIT).zip(units).enumerate() {
                    compact::decode_m_unit(codes, exponent, compact::unit_of(v, u), row);
                }
            }
        }
    }

    /// `len` of its numbers, to be read.
    #[inline(always)]
    fn read<'r>(
        &'r self,
        start: usize,
        len: usize,
        v: Option<&[f32]>,
        room: &'r mut RowBuffer,
    ) -> &'r [f32] {
        if let Self::F32(numbers) = self {
            return &numbers[start..start + len];
        }
        let row = &mut f32::buffer(room)[..len];
        self.decode(start, v, row);
        row
    }

    /// All of its numbers, `len`, to be changed.
    #[inline(always)]
    fn load<'r>(
        &'r mut self,
        len: usize,
        v: Option<&[f32]>,
        room: &'r mut RowBuffer,
    ) -> &'r mut [f32] {
        match self {
            Self::F32(numbers) => numbers,
            packed => {
                let row = &mut f32::buffer(room)[..len];
                packed.decode(0, v, row);
                row
            }
        }
    }
}

impl<'a> Packed<'a> {
    /// For [`StateRows::read`] alone.
    pub fn to_read(state: &'a mut State, n: usize) -> Self {
        Self::new(state, n, 0, Keys::default(), false)
    }

    /// The state of `n` elements of a parameter, from element `first` on. `rounds`: whether the parameter has no master and
    /// is rounded at random.
    pub fn new(state: &'a mut State, n: usize, first: usize, keys: Keys, rounds: bool) -> Self {
        fn numbers<'a>(name: &str, slot: &'a mut Option<Slot>, n: usize) -> Option<Numbers<'a>> {
            slot.as_mut().and_then(|slot| Numbers::new(name, slot, n))
        }
        let State { master, m, v, v_max, average, q } = state;
        let master = match master.as_mut().and_then(Slot::cpu_mut) {
            Some(CpuStorage::F32(master)) => Some(Master::F32(master)),
            Some(CpuStorage::I16(numbers)) => {
                let (rests, samples) = Format::split_parts(numbers, n);
                Some(Master::Split(rests, samples))
            }
            _ => rounds.then_some(Master::Rounded),
        };
        let [m, v, v_max] = [numbers("m", m, n), numbers("v", v, n), numbers("v_max", v_max, n)];
        let [average, q] = [numbers("average", average, n), numbers("q", q, n)];
        Self { master, m, v, v_max, average, q, keys, unit: (first / UNIT) as u64 }
    }
}

impl StateRows<f32> for Packed<'_> {
    const PACKED: bool = true;

    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        let Self { master, m, v, v_max, average, q, keys, unit } = self;
        let master = master.as_mut().map(|master| match master {
            Master::F32(master) => Master::F32(first(master, len)),
            Master::Split(rests, _) => Master::Split(first(rests, len), &mut []),
            Master::Rounded => Master::Rounded,
        });
        #[inline(always)]
        fn take<'a>(numbers: &mut Option<Numbers<'a>>, len: usize) -> Option<Numbers<'a>> {
            numbers.as_mut().map(|numbers| numbers.take(len))
        }
        // Each by itself, as in `Exact`.
        let part = Self {
            master,
            m: take(m, len),
            v: take(v, len),
            v_max: take(v_max, len),
            average: take(average, len),
            q: take(q, len),
            keys: *keys,
            unit: *unit,
        };
        *unit += (len / UNIT) as u64;
        part
    }

    #[inline(always)]
    fn read<'r>(&'r self, start: usize, len: usize, room: &'r mut Room) -> Row<'r, f32> {
        let Self { m, v, v_max, q, .. } = self;
        let [_, m_room, v_room, v_max_room, _, q_room] = room;
        let v = v.as_ref().map(|v| v.read(start, len, None, v_room));
        let m = m.as_ref().map(|m| m.read(start, len, v, m_room));
        let v_max = v_max.as_ref().map(|v_max| v_max.read(start, len, None, v_max_room));
        let q = q.as_ref().map(|q| q.read(start, len, None, q_room));
        Row { m, v, v_max, q }
    }

    #[inline(always)]
    fn read_average<'r>(
        &'r self,
        start: usize,
        len: usize,
        room: &'r mut RowBuffer,
    ) -> Option<&'r [f32]> {
        self.average.as_ref().map(|average| average.read(start, len, None, room))
    }

    #[inline(always)]
    fn load<'r, P: Parameter<Compute = f32>>(
        &'r mut self,
        w: &[P],
        room: &'r mut Room,
    ) -> RowMut<'r, f32> {
        let Self { master, m, v, v_max, average, q, .. } = self;
        let [master_room, m_room, v_room, v_max_room, average_room, q_room] = room;
        let len = w.len();
        let master = match master {
            None => None,
            Some(Master::F32(master)) => Some(&mut **master),
            Some(Master::Split(rests, _)) => {
                let row = &mut f32::buffer(master_room)[..len];
                for (x, (w, rest)) in row.iter_mut().zip(w.iter().zip(&**rests)) {
                    *x = compact::join(w.bits(), *rest);
                }
                Some(row)
            }
            Some(Master::Rounded) => {
                let row = &mut f32::buffer(master_room)[..len];
                row.iter_mut().zip(w).for_each(|(x, w)| *x = w.widen());
                Some(row)
            }
        };
        let compact =
            matches!((&*m, &*v), (Some(Numbers::CompactM(_)), Some(Numbers::CompactV(_))));
        let v = v.as_mut().map(|v| v.load(len, None, v_room));
        let m = m.as_mut().map(|m| m.load(len, v.as_deref(), m_room));
        let v_max = v_max.as_mut().map(|v_max| v_max.load(len, None, v_max_room));
        let average = average.as_mut().map(|average| average.load(len, None, average_room));
        let q = q.as_mut().map(|q| q.load(len, None, q_room));
        RowMut { master, m, v, v_max, average, q, compact }
    }

    #[inline(always)]
    fn streams(&self, start: usize) -> [Option<Stream>; 4] {
        let Self { master, m, v, average, .. } = self;
        let master = match master {
            Some(Master::F32(master)) => Some(Stream::of(master, start)),
            Some(Master::Split(rests, _)) => Some(Stream::of(rests, start)),
            Some(Master::Rounded) | None => None,
        };
        let stream = |numbers: &Option<Numbers>| numbers.as_ref().map(|x| x.stream(start));
        [master, stream(m), stream(v), stream(average)]
    }

    #[inline(always)]
    fn store<P: Parameter<Compute = f32>>(&mut self, w: &[P], room: &mut Room) {
        let Self { master, m, v, average, keys, unit, .. } = self;
        let [master_room, m_room, v_room, _, average_room, _] = room;
        if let Some(Master::Split(rests, _)) = master {
            let row = &f32::buffer(master_room)[..rests.len()];
            for (rest, (x, w)) in rests.iter_mut().zip(row.iter().zip(w)) {
                *rest = compact::remainder(*x, w.bits());
            }
        }
        match (m, v) {
            (Some(Numbers::CompactM(m)), Some(Numbers::CompactV(v))) => {
                let n = v.codes.len();
                let m = Moment { compact: m, numbers: &mut f32::buffer(m_room)[..n] };
                let v = Moment { compact: v, numbers: &mut f32::buffer(v_room)[..n] };
                moments::encode(m, v, moments::bases(keys.moments, *unit));
            }
            (Some(Numbers::CompactM(m)), _) => {
                let row = &*f32::buffer(m_room);
                for ((codes, exponent), m) in m.units_mut().zip(row.chunks(UNIT)) {
                    *exponent = compact::encode_m_unit(&m[..codes.len()], None, codes);
                }
            }
            // No second moment is compact without the first: they have the same format.
            _ => {}
        }
        if let Some(Numbers::BF16(average)) = average {
            let row = &f32::buffer(average_room)[..average.len()];
            compact::round_row(average, row, keys.averages, *unit);
        }
    }

    fn reset_masters<P: Parameter<Compute = f32>>(&mut self, w: &[P], samples: Samples) {
        match &mut self.master {
            Some(Master::F32(master)) => reset(master, w, samples),
            Some(Master::Split(rests, noted)) if samples.differ(w, noted) => rests.fill(0),
            _ => {}
        }
    }

    fn take_samples<'s>(&mut self) -> &'s mut [i16]
    where
        Self: 's,
    {
        match &mut self.master {
            Some(Master::Split(_, samples)) => std::mem::take(samples),
            _ => &mut [],
        }
    }
}
