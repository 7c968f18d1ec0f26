//! An executable of the shape Go's linker writes, made here, so that each part of it can be damaged.

use proptest::prelude::*;

use super::*;

/// What to make.
#[derive(Clone, Copy)]
struct Shape {
    /// Pointers are zero in the file, and relocations carry them.
    pie: bool,
    /// The table's header has the address of the code, as until Go 1.25.
    text_in_header: bool,
    /// `runtime.moduledata` has a section of its own, as since Go 1.26.
    module_section: bool,
    architecture: Architecture,
    version: &'static str,
    name: &'static str,
    copies: usize,
    /// A line of the build's settings.
    setting: &'static str,
}

const SHAPE: Shape = Shape {
    pie: false,
    text_in_header: false,
    module_section: true,
    architecture: Architecture::X86_64,
    version: "go1.26.8",
    name: FUNCTION,
    copies: 1,
    setting: "",
};

/// The segments' addresses differ from their places in the file, and the code begins behind its segment's beginning.
const BASE: u64 = 0x40_0000;
const TEXT: u64 = BASE + TEXT_AT as u64;
const ENTRY: u64 = TEXT + 0x20;
const TEXT_AT: usize = 0x1040;
const FUNCTION_AT: usize = 0x80;
const FUNCTION_LENGTH: usize = 0x60;
const TABLE_AT: usize = 0x2000;
const INFO_AT: usize = 0x3000;
const MODULE_AT: usize = 0x3200;
const RELA_AT: usize = 0x3400;
const NAMES_AT: usize = 0x3800;
const SECTIONS_AT: usize = 0x3900;

const X86_64: [u8; 41] = [
    0x49, 0x3b, 0x66, 0x10, 0x76, 0x24, // cmp 0x10(%r14),%rsp; jbe
    0x55, 0x48, 0x89, 0xe5, // push %rbp; mov %rsp,%rbp
    0x48, 0x89, 0x44, 0x24, 0x10, // mov %rax,0x10(%rsp)
    0x48, 0x8b, 0x50, 0x08, // mov 0x8(%rax),%rdx
    0x48, 0x8b, 0x02, 0xff, 0xd0, // mov (%rdx),%rax; call *%rax
    0x48, 0x8b, 0x44, 0x24, 0x10, // mov 0x10(%rsp),%rax
    0xf2, 0x0f, 0x10, 0x08, // movsd (%rax),%xmm1
    0x66, 0x0f, 0x2e, 0xc8, // ucomisd %xmm0,%xmm1
    0x0f, 0x97, 0xc0, 0x5d, // seta %al; pop %rbp
];

const AARCH64: [u32; 9] = [
    0xf940_0b90, // ldr x16,[x28,#16]
    0xeb30_63ff, // cmp sp,x16
    0x5400_0429, // b.ls
    0xf81e_0ffe, // str x30,[sp,#-32]!
    0xf81f_83fd, // stur x29,[sp,#-8]
    0xd100_23fd, // sub x29,sp,#8
    0xf900_17e0, // str x0,[sp,#40]
    0xf940_041a, // ldr x26,[x0,#8]
    0xf940_0341, // ldr x1,[x26]
];

struct File {
    bytes: Vec<u8>,
    relocations: Vec<(u64, u64)>,
    pie: bool,
}

impl File {
    fn put(&mut self, at: usize, octets: &[u8]) {
        self.bytes[at..at + octets.len()].copy_from_slice(octets);
    }

    fn word(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn half(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn pointer(&mut self, at: usize, value: u64) {
        if self.pie {
            self.relocations.push((BASE + at as u64, value));
        } else {
            self.word(at, value);
        }
    }
}

fn build(shape: Shape) -> Vec<u8> {
    let mut file = File {
        bytes: vec![0; SECTIONS_AT + 7 * 64],
        relocations: Vec::new(),
        pie: shape.pie,
    };
    let (machine, relative) = match shape.architecture {
        Architecture::X86_64 => (62_u32, 8_u64),
        Architecture::Aarch64 => (183, 1027),
    };
    file.put(0, b"\x7fELF\x02\x01\x01");
    file.half(16, machine << 16 | if shape.pie { 3 } else { 2 });
    file.half(20, 1);
    file.word(24, ENTRY);
    file.word(32, 64);
    file.word(40, SECTIONS_AT as u64);
    file.put(52, &[64, 0, 56, 0, 2, 0, 64, 0, 7, 0, 6, 0]);
    // Two segments: code and tables, readable and executable; data, readable and writable.
    for (index, (flags, begin, end)) in [(5, 0, INFO_AT), (6, INFO_AT, NAMES_AT)].into_iter().enumerate() {
        let at = 64 + 56 * index;
        file.half(at, 1);
        file.half(at + 4, flags);
        file.word(at + 8, begin as u64);
        file.word(at + 16, BASE + begin as u64);
        file.word(at + 32, (end - begin) as u64);
        file.word(at + 40, (end - begin) as u64);
    }
    let code = match shape.architecture {
        Architecture::X86_64 => X86_64.to_vec(),
        Architecture::Aarch64 => AARCH64.iter().flat_map(|word| word.to_le_bytes()).collect(),
    };
    file.put(TEXT_AT + FUNCTION_AT, &code);

    // Two other functions around it, and as many copies as were asked for.
    let names = format!("main.main\0{}\0main.last\0", shape.name);
    let own = "main.main\0".len() as u32;
    let mut functions = vec![(0, 0)];
    functions.extend((0..shape.copies).map(|copy| ((FUNCTION_AT + copy * FUNCTION_LENGTH) as u32, own)));
    functions.push((
        (FUNCTION_AT + FUNCTION_LENGTH * shape.copies) as u32,
        own + shape.name.len() as u32 + 1,
    ));
    let end = FUNCTION_AT + FUNCTION_LENGTH * (shape.copies + 1);
    let (names_at, table_at) = (72, 72 + names.len().next_multiple_of(8));
    file.half(TABLE_AT, 0xffff_fff1);
    file.put(TABLE_AT + 6, &[1, 8]);
    file.word(TABLE_AT + 8, functions.len() as u64);
    if shape.text_in_header {
        file.pointer(TABLE_AT + 24, TEXT);
    }
    file.word(TABLE_AT + 32, names_at as u64);
    file.word(TABLE_AT + 64, table_at as u64);
    file.put(TABLE_AT + names_at, names.as_bytes());
    let records = (functions.len() + 1) * 8;
    for (index, (offset, name)) in functions.iter().enumerate() {
        let record = records + index * 8;
        file.half(TABLE_AT + table_at + index * 8, *offset);
        file.half(TABLE_AT + table_at + index * 8 + 4, record as u32);
        file.half(TABLE_AT + table_at + record, *offset);
        file.half(TABLE_AT + table_at + record + 4, *name);
    }
    file.half(TABLE_AT + table_at + functions.len() * 8, end as u32);

    file.put(INFO_AT, b"\xff Go buildinf:\x08\x02");
    file.put(INFO_AT + 32, &[shape.version.len() as u8]);
    file.put(INFO_AT + 33, shape.version.as_bytes());
    let modules = format!(
        "{0}path\tk8s.io/x\ndep\tk8s.io/apiserver\tv0.36.2\th1:\n{1}{0}",
        "0123456789abcdef", shape.setting
    );
    let at = INFO_AT + 33 + shape.version.len();
    file.put(at, &[modules.len() as u8]);
    file.put(at + 1, modules.as_bytes());

    let table = BASE + TABLE_AT as u64;
    file.pointer(MODULE_AT, table);
    file.pointer(MODULE_AT + 8, table + names_at as u64);
    file.pointer(MODULE_AT + 128, table + table_at as u64);
    file.word(MODULE_AT + 136, functions.len() as u64 + 1);
    file.pointer(MODULE_AT + 160, TEXT);
    file.pointer(MODULE_AT + 168, TEXT + end as u64);
    file.pointer(MODULE_AT + 176, TEXT);

    let relocations = std::mem::take(&mut file.relocations);
    for (index, (at, value)) in relocations.iter().enumerate() {
        file.word(RELA_AT + index * 24, *at);
        file.word(RELA_AT + index * 24 + 8, relative);
        file.word(RELA_AT + index * 24 + 16, *value);
    }

    let section_names = b"\0.text\0.gopclntab\0.go.buildinfo\0.go.module\0.rela.dyn\0.shstrtab\0";
    file.put(NAMES_AT, section_names);
    for (index, (name, kind, begin, length)) in [
        (1, 1, TEXT_AT, end),
        (7, 1, TABLE_AT, INFO_AT - TABLE_AT),
        (18, 1, INFO_AT, MODULE_AT - INFO_AT),
        (if shape.module_section { 32 } else { 1 }, 1, MODULE_AT, 0x200),
        (43, 4, RELA_AT, relocations.len() * 24),
        (53, 3, NAMES_AT, section_names.len()),
    ]
    .into_iter()
    .enumerate()
    {
        let at = SECTIONS_AT + 64 * (index + 1);
        file.half(at, name);
        file.half(at + 4, kind);
        file.word(at + 16, BASE + begin as u64);
        file.word(at + 24, begin as u64);
        file.word(at + 32, length as u64);
        file.word(at + 56, if kind == 4 { 24 } else { 0 });
    }
    file.bytes
}

fn shapes() -> impl Iterator<Item = Shape> {
    (0..16_u32).map(|bits| {
        let bit = |index: u32| bits >> index & 1 == 1;
        Shape {
            pie: bit(0),
            text_in_header: bit(1),
            module_section: bit(2),
            architecture: if bit(3) {
                Architecture::Aarch64
            } else {
                Architecture::X86_64
            },
            ..SHAPE
        }
    })
}

#[test]
fn the_function_is_found_in_every_shape() {
    for shape in shapes() {
        let point = find(&build(shape)).expect("a function");
        assert_eq!(point.address, TEXT + FUNCTION_AT as u64);
        assert_eq!(point.file_offset, (TEXT_AT + FUNCTION_AT) as u64);
        assert_eq!(point.architecture, shape.architecture);
        assert_eq!(point.build.apiserver.as_deref(), Some("v0.36.2"));
        assert_eq!((point.layout.proto, point.layout.remote_address), (24, 176));
        assert_eq!(point.entry, ENTRY);
        assert_eq!(point.code[..2], build(shape)[TEXT_AT + FUNCTION_AT..][..2]);
    }
    let vendored = "k8s.io/kubernetes/vendor/k8s.io/apiserver/pkg/server/filters.(*probabilisticGoawayDecider).Goaway";
    let found = find(&build(Shape {
        name: vendored,
        ..SHAPE
    }));
    assert_eq!(found.map(|point| point.address), Ok(TEXT + FUNCTION_AT as u64));
}

#[test]
fn what_is_not_recognised_is_refused_by_name() {
    let refusal = |shape: Shape| find(&build(shape)).expect_err("a refusal");
    let damaged = |at: usize, octet: u8| {
        let mut bytes = build(SHAPE);
        bytes[at] = octet;
        find(&bytes).expect_err("a refusal")
    };
    assert_eq!(
        find(b"#!/bin/sh\n"),
        Err(Refusal::NotElf {
            why: "its header is not one"
        })
    );
    assert_eq!(
        damaged(16, 1),
        Refusal::NotElf {
            why: "it cannot be executed"
        }
    );
    assert_eq!(damaged(18, 243), Refusal::UnsupportedArchitecture { machine: 243 });
    assert_eq!(damaged(INFO_AT + 2, b'g'), Refusal::NotGo);
    assert!(matches!(
        damaged(TABLE_AT, 0xf2),
        Refusal::UnknownFunctionTable { magic: 0xffff_fff2 }
    ));
    assert!(matches!(damaged(MODULE_AT + 177, 9), Refusal::NoTextStart { .. }));
    assert!(matches!(
        damaged(TEXT_AT + FUNCTION_AT, 0x90),
        Refusal::UnexpectedCode { .. }
    ));
    // A receiver whose closure lies elsewhere.
    assert!(matches!(
        damaged(TEXT_AT + FUNCTION_AT + 18, 0x10),
        Refusal::UnexpectedCode { .. }
    ));
    let version = "go1.28.0";
    assert!(matches!(
        refusal(Shape { version, ..SHAPE }),
        Refusal::UnknownGoVersion { .. }
    ));
    for (setting, profile) in [
        ("build\t-pgo=default.pgo\n", Some("default.pgo")),
        ("build\t-pgo=off\n", None),
        ("build\t-buildmode=exe\n", None),
    ] {
        let found = find(&build(Shape { setting, ..SHAPE }));
        let refused = profile.map(|profile| Refusal::ProfileGuided {
            profile: profile.to_owned(),
        });
        assert_eq!(found.err(), refused, "{setting}");
    }
    assert_eq!(
        refusal(Shape {
            name: "main.other",
            ..SHAPE
        }),
        Refusal::NoGoawayFilter
    );
    assert_eq!(refusal(Shape { copies: 0, ..SHAPE }), Refusal::NoGoawayFilter);
    assert_eq!(refusal(Shape { copies: 2, ..SHAPE }), Refusal::Ambiguous { count: 2 });
}

#[test]
fn every_prefix_is_refused() {
    for shape in shapes().step_by(5) {
        let bytes = build(shape);
        for length in 0..SECTIONS_AT + 6 * 64 {
            assert!(find(&bytes[..length]).is_err(), "{length} octets of {}", bytes.len());
        }
    }
}

/// Whatever is answered lies in the code, at instructions that were checked.
fn checked(bytes: &[u8]) {
    if let Ok(point) = find(bytes) {
        let at = usize::try_from(point.file_offset).expect("an offset in the file");
        let code = &bytes[at..];
        assert!(code::check(point.architecture, code).is_ok());
    }
}

#[test]
fn no_single_damaged_octet_leads_astray() {
    for shape in [
        SHAPE,
        Shape {
            pie: true,
            module_section: false,
            ..SHAPE
        },
    ] {
        let bytes = build(shape);
        for at in 0..bytes.len() {
            for octet in [0x00, 0x01, 0x7f, 0x80, 0xff, bytes[at] ^ 4] {
                let mut bytes = bytes.clone();
                bytes[at] = octet;
                checked(&bytes);
            }
        }
    }
}

proptest! {
    #[test]
    fn no_damage_leads_astray(
        index in 0_usize..16,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 1_usize..9), 1..12),
        cut in any::<prop::sample::Index>(),
        whole in any::<bool>(),
    ) {
        let mut bytes = build(shapes().nth(index).expect("a shape"));
        for (at, value, width) in damage {
            let at = at.index(bytes.len() - 8);
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        if !whole {
            bytes.truncate(cut.index(bytes.len()));
        }
        checked(&bytes);
    }
}
