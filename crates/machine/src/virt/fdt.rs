//! The device tree of the board `virt`: how the guest learns what there is.
//!
//! Sources: Devicetree Specification 0.4; Linux `Documentation/devicetree/bindings` (arm,gic-v3, arm,pl011, arm,psci,
//! arm,arch_timer) and `Documentation/devicetree/bindings/chosen.txt`. A pure function: the same description gives the
//! same bytes on every host.

use std::ops::Range;

use vm_accel::aarch64::{Gic, GicVersion, PHYSICAL_TIMER_INTID, VIRTUAL_TIMER_INTID, affinity};
use vm_fdt::{FdtWriter, FdtWriterResult};

use super::{RAM, RTC, UART, UART_INTID};
use crate::devices::pl011::PL011_LEN;
use crate::devices::pl031::PL031_LEN;

/// Bytes of randomness for the guest's own.
pub const SEED_LEN: usize = 64;

/// What the tree says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description<'a> {
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of CPUs.
    pub cpus: u32,
    /// The GIC.
    pub gic: Gic,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Where the initial RAM disk is.
    pub initrd: Option<Range<u64>>,
    /// Randomness: the first 8 bytes choose the kernel's addresses, the others feed its random numbers.
    pub seed: [u8; SEED_LEN],
}

const GIC_PHANDLE: u32 = 1;
const CLOCK_PHANDLE: u32 = 2;
const ITS_PHANDLE: u32 = 3;
/// Interrupt specifiers: kind, number, flags.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
const LEVEL_HIGH: u32 = 4;
/// The frequency that the PL011's and PL031's drivers are told; nothing runs at it.
const CLOCK: u32 = 24_000_000;
/// Timers that an EL1 guest has no use for, but whose places in the list are fixed: secure physical, hypervisor.
const SECURE_TIMER_INTID: u32 = 29;
const HYPERVISOR_TIMER_INTID: u32 = 26;

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// Builds the tree.
///
/// # Errors
/// If the command line has a NUL in it.
pub fn build(board: &Description<'_>) -> FdtWriterResult<Vec<u8>> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string_list("compatible", strings(&["vm-accel,virt", "linux,dummy-virt"]))?;
    fdt.property_string("model", "vm-accel virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
    chosen(&mut fdt, board)?;

    let memory = fdt.begin_node(&format!("memory@{RAM:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM, board.memory])?;
    fdt.end_node(memory)?;

    cpus(&mut fdt, board.cpus)?;

    let psci = fdt.begin_node("psci")?;
    fdt.property_string_list("compatible", strings(&["arm,psci-1.0", "arm,psci-0.2"]))?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(psci)?;

    timer(&mut fdt, board)?;
    gic(&mut fdt, board)?;

    let clock = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", CLOCK)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK_PHANDLE)?;
    fdt.end_node(clock)?;

    let uart = fdt.begin_node(&uart_name())?;
    fdt.property_string_list("compatible", strings(&["arm,pl011", "arm,primecell"]))?;
    fdt.property_array_u64("reg", &[UART, PL011_LEN])?;
    fdt.property_array_u32("interrupts", &[SHARED, UART_INTID - 32, LEVEL_HIGH])?;
    fdt.property_array_u32("clocks", &[CLOCK_PHANDLE, CLOCK_PHANDLE])?;
    fdt.property_string_list("clock-names", strings(&["uartclk", "apb_pclk"]))?;
    fdt.end_node(uart)?;

    let rtc = fdt.begin_node(&format!("rtc@{RTC:x}"))?;
    fdt.property_string_list("compatible", strings(&["arm,pl031", "arm,primecell"]))?;
    fdt.property_array_u64("reg", &[RTC, PL031_LEN])?;
    fdt.property_u32("clocks", CLOCK_PHANDLE)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.end_node(rtc)?;

    fdt.end_node(root)?;
    fdt.finish()
}

fn uart_name() -> String {
    format!("uart@{UART:x}")
}

fn chosen(fdt: &mut FdtWriter, board: &Description<'_>) -> FdtWriterResult<()> {
    let path = format!("/{}", uart_name());
    let aliases = fdt.begin_node("aliases")?;
    fdt.property_string("serial0", &path)?;
    fdt.end_node(aliases)?;
    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", board.cmdline)?;
    fdt.property_string("stdout-path", &path)?;
    if let Some(initrd) = &board.initrd {
        fdt.property_u64("linux,initrd-start", initrd.start)?;
        fdt.property_u64("linux,initrd-end", initrd.end)?;
    }
    let (addresses, numbers) = board.seed.split_at(8);
    fdt.property("kaslr-seed", addresses)?;
    fdt.property("rng-seed", numbers)?;
    fdt.end_node(chosen)
}

fn cpus(fdt: &mut FdtWriter, count: u32) -> FdtWriterResult<()> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for id in 0..count {
        let affinity = affinity(id);
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_u64("reg", affinity)?;
        fdt.property_string("enable-method", "psci")?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)
}

fn timer(fdt: &mut FdtWriter, board: &Description<'_>) -> FdtWriterResult<()> {
    // With a GICv2 the flags of a private interrupt say which CPUs have it.
    let cpus = match board.gic.version {
        GicVersion::V2 => (1u32.checked_shl(board.cpus.min(8)).unwrap_or(0) - 1) << 8,
        GicVersion::V3 => 0,
    };
    let interrupts: Vec<u32> = [SECURE_TIMER_INTID, PHYSICAL_TIMER_INTID, VIRTUAL_TIMER_INTID, HYPERVISOR_TIMER_INTID]
        .into_iter()
        .flat_map(|intid| [PRIVATE, intid - 16, LEVEL_HIGH | cpus])
        .collect();
    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)
}

fn gic(fdt: &mut FdtWriter, board: &Description<'_>) -> FdtWriterResult<()> {
    let gic = &board.gic;
    let (compatible, cpus) = match gic.version {
        GicVersion::V2 => ("arm,cortex-a15-gic", Gic::GICV2_CPU_SIZE),
        GicVersion::V3 => {
            let size = u64::from(board.cpus) * Gic::GICV3_REDISTRIBUTOR_SIZE;
            ("arm,gic-v3", size)
        }
    };
    let node = fdt.begin_node(&format!("intc@{:x}", gic.distributor))?;
    fdt.property_string("compatible", compatible)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_array_u64("reg", &[gic.distributor, Gic::DISTRIBUTOR_SIZE, gic.cpus, cpus])?;
    fdt.property_phandle(GIC_PHANDLE)?;
    if let Some(its) = gic.its {
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 2)?;
        fdt.property_null("ranges")?;
        let node = fdt.begin_node(&format!("its@{its:x}"))?;
        fdt.property_string("compatible", "arm,gic-v3-its")?;
        fdt.property_null("msi-controller")?;
        fdt.property_u32("#msi-cells", 1)?;
        fdt.property_array_u64("reg", &[its, Gic::ITS_SIZE])?;
        fdt.property_phandle(ITS_PHANDLE)?;
        fdt.end_node(node)?;
    }
    fdt.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Properties of a tree by path, read back with a reader of our own (Devicetree Specification, chapter 5).
    fn parse(blob: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let word = |at: usize| u32::from_be_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
        assert_eq!((word(0), word(4)), (0xd00d_feed, blob.len()));
        let text = |at: usize| {
            let len = blob[at..].iter().position(|byte| *byte == 0).unwrap();
            String::from_utf8(blob[at..at + len].to_vec()).unwrap()
        };
        let (mut at, names) = (word(8), word(12));
        let (mut path, mut found) = (Vec::<String>::new(), BTreeMap::new());
        loop {
            let token = word(at);
            at += 4;
            match token {
                1 => {
                    let name = text(at);
                    at = (at + name.len() + 1).next_multiple_of(4);
                    path.push(name);
                }
                2 => drop(path.pop()),
                3 => {
                    let (len, name) = (word(at), text(names + word(at + 4)));
                    let value = blob[at + 8..at + 8 + len].to_vec();
                    assert!(found.insert(format!("{}/{name}", path.join("/")), value).is_none());
                    at = (at + 8 + len).next_multiple_of(4);
                }
                4 => {}
                9 => return found,
                other => panic!("token {other}"),
            }
        }
    }

    fn board() -> Description<'static> {
        Description {
            memory: 256 << 20,
            cpus: 18,
            gic: Gic {
                version: GicVersion::V3,
                distributor: Gic::DISTRIBUTOR,
                cpus: Gic::GICV3_REDISTRIBUTORS,
                its: Some(Gic::ITS),
                msi_frame: None,
            },
            cmdline: "console=ttyAMA0 quiet",
            initrd: Some(0x4800_0000..0x4810_1234),
            seed: std::array::from_fn(|n| n as u8),
        }
    }

    fn u64s(values: &[u64]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_be_bytes()).collect()
    }

    fn u32s(values: &[u32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_be_bytes()).collect()
    }

    #[test]
    fn the_tree_says_what_the_board_is() {
        let tree = parse(&build(&board()).unwrap());
        let is = |path: &str, value: &[u8]| assert_eq!(tree.get(path).map(Vec::as_slice), Some(value), "{path}");
        is("/memory@40000000/reg", &u64s(&[RAM, 256 << 20]));
        is("/chosen/bootargs", b"console=ttyAMA0 quiet\0");
        is("/chosen/stdout-path", b"/uart@9000000\0");
        is("/chosen/linux,initrd-start", &u64s(&[0x4800_0000]));
        is("/chosen/linux,initrd-end", &u64s(&[0x4810_1234]));
        is("/chosen/kaslr-seed", &[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(tree["/chosen/rng-seed"].len(), SEED_LEN - 8);
        is("/cpus/cpu@0/reg", &u64s(&[0]));
        is("/cpus/cpu@f/enable-method", b"psci\0");
        is("/cpus/cpu@101/reg", &u64s(&[0x101]));
        is("/psci/method", b"hvc\0");
        is("/timer/interrupts", &u32s(&[1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]));
        let regs = [0x800_0000, 0x1_0000, 0x1000_0000, 18 * 0x2_0000];
        is("/intc@8000000/reg", &u64s(&regs));
        is("/intc@8000000/its@8080000/reg", &u64s(&[Gic::ITS, Gic::ITS_SIZE]));
        is("/uart@9000000/interrupts", &u32s(&[0, 1, 4]));
        is("/uart@9000000/compatible", b"arm,pl011\0arm,primecell\0");
        is("/rtc@9010000/reg", &u64s(&[RTC, 0x1000]));
    }

    #[test]
    fn a_gicv2_has_a_cpu_interface_and_cpu_masks() {
        let mut board = board();
        board.cpus = 3;
        board.gic = Gic {
            version: GicVersion::V2,
            distributor: Gic::DISTRIBUTOR,
            cpus: Gic::GICV2_CPU,
            its: None,
            msi_frame: None,
        };
        let tree = parse(&build(&board).unwrap());
        assert_eq!(tree["/intc@8000000/compatible"], b"arm,cortex-a15-gic\0");
        assert_eq!(tree["/timer/interrupts"][..12], u32s(&[1, 13, 0x704]));
        assert!(!tree.keys().any(|path| path.contains("its@")));
    }

    #[test]
    fn what_is_not_there_is_not_mentioned() {
        let mut board = board();
        board.initrd = None;
        let tree = parse(&build(&board).unwrap());
        assert!(!tree.keys().any(|path| path.contains("initrd")));
        assert!(build(&Description { cmdline: "a\0b", ..board }).is_err());
    }
}
