//! An ELF file as addresses: sections, what is loaded where, and pointers that the loader will write.
//!
//! Must never read outside the file, whatever its headers say.

use object::{
    LittleEndian as Le,
    elf::{self, FileHeader64, ProgramHeader64},
    read::{
        ReadRef as _,
        elf::{FileHeader as _, ProgramHeader as _, Rela as _, SectionHeader as _, SectionTable},
    },
};

use super::{Architecture, Refusal};

/// A parsed file.
pub struct Image<'a> {
    bytes: &'a [u8],
    architecture: Architecture,
    entry: u64,
    segments: &'a [ProgramHeader64<Le>],
    sections: SectionTable<'a, FileHeader64<Le>>,
}

/// A section's octets, and the address they are loaded at.
#[derive(Clone, Copy)]
pub struct Section<'a> {
    /// As linked.
    pub address: u64,
    /// From the file.
    pub bytes: &'a [u8],
}

impl<'a> Image<'a> {
    /// Reads the headers.
    ///
    /// # Errors
    ///
    /// [`Refusal::NotElf`], [`Refusal::UnsupportedArchitecture`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Refusal> {
        let not_elf = |why| Refusal::NotElf { why };
        let header = FileHeader64::<Le>::parse(bytes).map_err(|_| not_elf("its header is not one"))?;
        if header.e_ident().data != elf::ELFDATA2LSB {
            return Err(not_elf("it is big-endian"));
        }
        if !matches!(header.e_type(Le), elf::ET_EXEC | elf::ET_DYN) {
            return Err(not_elf("it cannot be executed"));
        }
        let architecture = match header.e_machine(Le) {
            elf::EM_X86_64 => Architecture::X86_64,
            elf::EM_AARCH64 => Architecture::Aarch64,
            machine => return Err(Refusal::UnsupportedArchitecture { machine }),
        };
        let segments = header
            .program_headers(Le, bytes)
            .map_err(|_| not_elf("its program headers lie outside the file"))?;
        let sections = header
            .sections(Le, bytes)
            .map_err(|_| not_elf("its section headers lie outside the file"))?;
        Ok(Self {
            bytes,
            architecture,
            entry: header.e_entry(Le),
            segments,
            sections,
        })
    }

    /// The processor it is for.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Where execution begins, as linked.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The first section with one of these names that lies in the file.
    pub fn section(&self, names: &[&[u8]]) -> Option<Section<'a>> {
        self.sections.iter().find_map(|section| {
            let name = self.sections.section_name(Le, section).ok()?;
            if !names.contains(&name) {
                return None;
            }
            Some(Section {
                address: section.sh_addr(Le),
                bytes: section.data(Le, self.bytes).ok()?,
            })
        })
    }

    /// The loaded octets from an address on, at most to the end of its segment in the file.
    pub fn loaded(&self, address: u64) -> Option<&'a [u8]> {
        self.segment(address, 0).map(|(_, bytes)| bytes)
    }

    /// `length` octets of executable code.
    pub fn code(&self, address: u64, length: u64) -> Option<&'a [u8]> {
        let (_, bytes) = self.segment(address, elf::PF_X)?;
        bytes.get(..usize::try_from(length).ok()?)
    }

    /// Where an address lies in the file.
    pub fn file_offset(&self, address: u64) -> Option<u64> {
        self.segment(address, 0).map(|(offset, _)| offset)
    }

    /// The pointer at an address once the loader is done: a relative relocation's addend, else what the file has.
    pub fn pointer(&self, address: u64) -> Option<u64> {
        let relocated = self
            .relocations()
            .find(|(at, _)| *at == address)
            .map(|(_, addend)| addend);
        relocated.or_else(|| Some(u64::from_le_bytes(*self.loaded(address)?.first_chunk()?)))
    }

    /// Addresses of writable memory that hold a pointer to `target`.
    pub fn pointers_to(&self, target: u64) -> Vec<u64> {
        let relocated = self
            .relocations()
            .filter(|(_, addend)| *addend == target)
            .map(|(at, _)| at);
        let mut found: Vec<u64> = relocated.collect();
        for segment in self.segments {
            if segment.p_type(Le) != elf::PT_LOAD || segment.p_flags(Le) & elf::PF_W == 0 {
                continue;
            }
            let (begin, size) = segment.file_range(Le);
            let Ok(bytes) = self.bytes.read_bytes_at(begin, size) else {
                continue;
            };
            let words = bytes.chunks_exact(8).enumerate();
            found.extend(
                words
                    .filter(|(_, word)| *word == target.to_le_bytes())
                    .map(|(index, _)| segment.p_vaddr(Le).wrapping_add(8 * index as u64)),
            );
        }
        found
    }

    /// Relative relocations: where, and the address that goes there.
    fn relocations(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let relative = match self.architecture {
            Architecture::X86_64 => elf::R_X86_64_RELATIVE,
            Architecture::Aarch64 => elf::R_AARCH64_RELATIVE,
        };
        self.sections
            .iter()
            .filter_map(|section| section.rela(Le, self.bytes).ok().flatten())
            .flat_map(|(entries, _)| entries)
            .filter(move |entry| entry.r_type(Le, false) == relative)
            .map(|entry| (entry.r_offset(Le), entry.r_addend(Le) as u64))
    }

    /// Where in the file an address of a loaded segment lies, and the octets from there to the segment's end.
    fn segment(&self, address: u64, flags: u32) -> Option<(u64, &'a [u8])> {
        self.segments.iter().find_map(|segment| {
            if segment.p_type(Le) != elf::PT_LOAD || segment.p_flags(Le) & flags != flags {
                return None;
            }
            let into = address.checked_sub(segment.p_vaddr(Le))?;
            let rest = segment.p_filesz(Le).checked_sub(into).filter(|rest| *rest > 0)?;
            let offset = segment.p_offset(Le).checked_add(into)?;
            Some((offset, self.bytes.read_bytes_at(offset, rest).ok()?))
        })
    }
}
