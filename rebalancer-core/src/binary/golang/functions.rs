//! Go's function table (`.gopclntab`, runtime/symtab.go and internal/abi): it is there also in stripped binaries.
//!
//! Must never take `.text` for the base of code addresses: with cgo or PIE they differ. `runtime.text` is in the
//! table's header until Go 1.25, and in `runtime.firstmoduledata` always; the two ends of the table confirm it.

use super::{
    Refusal,
    image::{Image, Section},
};

/// Go 1.18 and 1.19; since Go 1.20.
const MAGICS: [u32; 2] = [0xffff_fff0, 0xffff_fff1];

/// Offsets in the header (`runtime.pcHeader`).
mod header {
    pub const POINTER_SIZE: usize = 7;
    pub const FUNCTIONS: usize = 8;
    pub const TEXT_START: u64 = 24;
    pub const NAMES: usize = 32;
    pub const TABLE: usize = 64;
}

/// Offsets in `runtime.moduledata`: its beginning is the same from Go 1.18 to Go 1.27.
mod module {
    pub const NAMES: u64 = 8;
    pub const TABLE: u64 = 128;
    pub const TABLE_LENGTH: u64 = 136;
    pub const LOWEST: u64 = 160;
    pub const HIGHEST: u64 = 168;
    pub const TEXT: u64 = 176;
}

const SECTION: [&[u8]; 2] = [b".gopclntab", b".data.rel.ro.gopclntab"];
const MODULE_SECTION: &[u8] = b".go.module";

/// A function of the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it begins, as linked.
    pub address: u64,
    /// How long it is.
    pub length: u64,
}

/// The table.
pub struct FunctionTable<'a> {
    names: &'a [u8],
    /// Pairs of 32-bit numbers, offset of the code and of the record, one pair a function; the last is the end.
    entries: &'a [[u8; 8]],
    /// What the records' offsets are relative to.
    records: &'a [u8],
    text: u64,
}

impl<'a> FunctionTable<'a> {
    /// Reads the header, and establishes where the code begins.
    ///
    /// # Errors
    ///
    /// [`Refusal`] for a table that is missing, of another form, or without a base.
    pub fn read(image: &Image<'a>) -> Result<Self, Refusal> {
        let malformed = || Refusal::Malformed { what: "function table" };
        let section = image.section(&SECTION).ok_or(Refusal::NoFunctionTable)?;
        let magic = half(section.bytes, 0).ok_or_else(malformed)?;
        if !MAGICS.contains(&magic) || section.bytes.get(header::POINTER_SIZE) != Some(&8) {
            return Err(Refusal::UnknownFunctionTable { magic });
        }
        let word = |at| word(section.bytes, at).and_then(|value| usize::try_from(value).ok());
        let part = |at| word(at).and_then(|offset| section.bytes.get(offset..));
        let names = part(header::NAMES).ok_or_else(malformed)?;
        let records = part(header::TABLE).ok_or_else(malformed)?;
        let (entries, _) = records.as_chunks::<8>();
        let functions = word(header::FUNCTIONS).ok_or_else(malformed)?;
        // One more than there are functions: the end of the last one.
        let entries = functions
            .checked_add(1)
            .and_then(|count| entries.get(..count))
            .ok_or_else(malformed)?;
        let mut table = Self {
            names,
            entries,
            records,
            text: 0,
        };
        table.text = table.text_start(image, &section)?;
        Ok(table)
    }

    /// The one function of that name, also as a vendored package's.
    ///
    /// # Errors
    ///
    /// None, or several.
    pub fn find(&self, name: &[u8]) -> Result<Function, Refusal> {
        let mut found = Vec::new();
        for pair in self.entries.windows(2) {
            if !self.name(&pair[0]).is_some_and(|own| is_named(own, name)) {
                continue;
            }
            let (begin, end) = (code_offset(&pair[0]), code_offset(&pair[1]));
            found.push(Function {
                address: self.text.wrapping_add(begin),
                length: end
                    .checked_sub(begin)
                    .ok_or(Refusal::Malformed { what: "function table" })?,
            });
        }
        match found[..] {
            [] => Err(Refusal::NoGoawayFilter),
            [function] => Ok(function),
            _ => Err(Refusal::Ambiguous { count: found.len() }),
        }
    }

    /// A name and what follows it; names end in zero.
    fn name(&self, entry: &[u8; 8]) -> Option<&'a [u8]> {
        let record = half(entry, 4)? as usize;
        let name = half(self.records, record.checked_add(4)?)?;
        self.names.get(name as usize..)
    }

    fn text_start(&self, image: &Image<'_>, section: &Section<'_>) -> Result<u64, Refusal> {
        let in_header = image.pointer(section.address.wrapping_add(header::TEXT_START));
        let modules = match image.section(&[MODULE_SECTION]) {
            Some(module) => vec![module.address],
            None => image.pointers_to(section.address),
        };
        let mut starts: Vec<u64> = modules
            .iter()
            .filter_map(|module| self.module_text(image, section, *module))
            .collect();
        starts.dedup();
        let no = |why| Refusal::NoTextStart { why };
        match (starts.as_slice(), in_header) {
            ([], _) => Err(no("no runtime.moduledata agrees with the function table")),
            ([text], Some(header)) if header != 0 && header != *text => Err(no(
                "runtime.moduledata and the function table's header contradict each other",
            )),
            ([text], _) => Ok(*text),
            _ => Err(no("there is more than one runtime.moduledata")),
        }
    }

    /// `text` of a `runtime.moduledata` that agrees with this table in everything that can be compared.
    fn module_text(&self, image: &Image<'_>, section: &Section<'_>, module: u64) -> Option<u64> {
        let pointer = |offset| image.pointer(module.checked_add(offset)?);
        let from_header = |at| section.address.checked_add(word(section.bytes, at)?);
        let (first, last) = (self.entries.first()?, self.entries.last()?);
        let text = pointer(module::TEXT)?;
        let agrees = pointer(0)? == section.address
            && pointer(module::NAMES)? == from_header(header::NAMES)?
            && pointer(module::TABLE)? == from_header(header::TABLE)?
            && pointer(module::TABLE_LENGTH)? == self.entries.len() as u64
            && pointer(module::LOWEST)? == text.checked_add(code_offset(first))?
            && pointer(module::HIGHEST)? == text.checked_add(code_offset(last))?;
        agrees.then_some(text)
    }
}

/// Whether what begins here is that name, alone or behind `…/vendor/`.
fn is_named(own: &[u8], name: &[u8]) -> bool {
    const VENDOR: &[u8] = b"/vendor/";
    // No name is longer; the names lie one behind the other.
    const LONGEST: usize = 256;
    if own.starts_with(name) {
        return own.get(name.len()) == Some(&0);
    }
    if !own.starts_with(b"k8s.io/") && !own.starts_with(b"github.com/") {
        return false;
    }
    let own = &own[..own.len().min(LONGEST)];
    let Some(end) = own.iter().position(|octet| *octet == 0) else {
        return false;
    };
    own[..end]
        .strip_suffix(name)
        .is_some_and(|before| before.ends_with(VENDOR))
}

fn code_offset(entry: &[u8; 8]) -> u64 {
    u64::from(u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]))
}

fn half(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vendored_package_is_the_same_function_and_a_longer_name_is_not() {
        for (own, is) in [
            (&b"k8s.io/a.f\0rest"[..], true),
            (b"k8s.io/kubernetes/vendor/k8s.io/a.f\0rest", true),
            (b"k8s.io/a.f.func1\0", false),
            (b"k8s.io/kubernetes/notvendor/k8s.io/a.f\0", false),
            (b"k8s.io/a.f", false),
            (b"", false),
        ] {
            assert_eq!(is_named(own, b"k8s.io/a.f"), is, "{}", String::from_utf8_lossy(own));
        }
    }
}
